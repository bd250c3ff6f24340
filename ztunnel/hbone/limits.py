"""What a multiplexer allows its peer, and what it advertises. Defaults are those of Istio's node proxy where it has them."""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.hbone.frames import DEFAULT_MAX_FRAME, DEFAULT_WINDOW, LARGEST_MAX_FRAME, MAX_WINDOW, PREFACE, Setting, settings, window_update


@dataclass(frozen=True, slots=True)
class MuxLimits:
    """The bounds of one connection. Source: Istio ztunnel `proxy/h2`, `config.rs`; the floods' budgets are ours."""

    stream_window: int = 4 << 20
    """Bytes that may be outstanding per stream: received and not yet given to `Mux.consumed`."""
    connection_window: int = 16 << 20
    """The same for all streams together. HTTP/2 starts at 65,535 and cannot go below."""
    max_frame: int = 1 << 20
    """Largest frame payload that we accept. DATA is never gathered, so it costs no memory."""
    client_header_bytes: int = 16 << 10
    """Bound of a header list as RFC 9113 counts it (32 bytes per field added), and of its encoded block, where we are the client."""
    server_header_bytes: int = 64 << 10
    """The same where we are the server."""
    streams: int = 200
    """Streams that a server serves at once; more are refused with REFUSED_STREAM."""
    assumed_streams: int = 100
    """Streams that a client opens before the server's SETTINGS said how many it may."""
    output_bytes: int = 1 << 20
    """Control bytes that may wait for a peer that does not read."""
    remembered_resets: int = 1024
    """Streams that we have reset and whose late frames are forgiven. Frames for older ones end the connection."""
    block_frames: int = 32
    """Frames (HEADERS and CONTINUATION) that one header block may come in."""
    pings: int = 1000
    """Per second, ours answered included. A sender that measures bandwidth pings once per round trip."""
    settings: int = 100
    """Per second, acknowledgements included."""
    resets: int = 1000
    """Per second: requests cancelled before they were answered, refused or malformed ones, interim responses."""
    empty_data: int = 1000
    """DATA without payload and without END_STREAM, per second."""
    window_updates: int = 2000
    """Per second, beyond two for each DATA frame and one for each 4 KiB that we have sent."""
    continuations: int = 1000
    priorities: int = 1000
    others: int = 1000
    """Frames of unknown types and GOAWAY, per second."""
    late_frames: int = 20_000
    """Frames for streams that are reset or closed, per second."""
    messages: bool = False
    """The streams carry requests and answers of HTTP, not tunnels: trailers and interim responses are told, a server offers extended
    CONNECT (RFC 8441) and nothing of ours."""

    def __post_init__(self) -> None:
        """Refuses what HTTP/2 cannot express."""
        if not DEFAULT_WINDOW <= self.connection_window <= MAX_WINDOW:
            raise ValueError(f"connection_window {self.connection_window} is not in {DEFAULT_WINDOW}..{MAX_WINDOW}")
        if not 1 <= self.stream_window <= MAX_WINDOW:
            raise ValueError(f"stream_window {self.stream_window} is not in 1..{MAX_WINDOW}")
        if not DEFAULT_MAX_FRAME <= self.max_frame <= LARGEST_MAX_FRAME:
            raise ValueError(f"max_frame {self.max_frame} is not in {DEFAULT_MAX_FRAME}..{LARGEST_MAX_FRAME}")

    def header_bytes(self, client: bool) -> int:
        """The header bound of this side."""
        return self.client_header_bytes if client else self.server_header_bytes

    def budgets(self) -> tuple[int, ...]:
        """The budgets per second in the order of `budget.Cost`."""
        return (
            self.pings,
            self.settings,
            self.resets,
            self.empty_data,
            self.window_updates,
            self.continuations,
            self.priorities,
            self.others,
            self.late_frames,
        )

    def greeting(self, client: bool) -> bytes:
        """What this side says first: the client's preface, SETTINGS, and how much the peer may send in all."""
        values: dict[int, int] = {Setting.HEADER_TABLE_SIZE: 0}
        if client:
            values[Setting.ENABLE_PUSH] = 0
        else:
            values[Setting.MAX_CONCURRENT_STREAMS] = self.streams
        values[Setting.INITIAL_WINDOW_SIZE] = self.stream_window
        values[Setting.MAX_FRAME_SIZE] = self.max_frame
        values[Setting.MAX_HEADER_LIST_SIZE] = self.header_bytes(client)
        if not client:
            values[Setting.ENABLE_CONNECT_PROTOCOL if self.messages else Setting.EARLY_DATA] = 1
        grown = self.connection_window - DEFAULT_WINDOW
        update = window_update(0, grown) if grown else b""
        return (PREFACE if client else b"") + settings(values) + update
