"""Numbers as people read them."""


def duration(seconds: float) -> str:
    """Seconds as people write them: `9.4 s`, `3 min 05 s`, `2 h 04 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: int) -> str:
    """A count with its unit prefix, four significant digits from a million on: `25.56 M`."""
    for scale, unit in ((10**9, "G"), (10**6, "M")):
        if value >= scale:
            return f"{value / scale:#.4g} {unit}"
    return f"{value:,}"
