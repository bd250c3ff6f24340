"""What ends a benchmark before its table."""


class BenchError(Exception):
    """It cannot go on; the text is for the person at the terminal."""
