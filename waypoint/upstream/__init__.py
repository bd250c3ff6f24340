"""Pure decisions about where a request goes: balancers, health, circuit breakers. Clock and dice are given."""
