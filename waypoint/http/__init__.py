"""Pure decisions about one request: matching, editing, retrying, who may. No clock, no socket, no logging."""
