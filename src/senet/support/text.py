"""Numbers and names as people read them."""

import codecs
import unicodedata


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


def printable(name: str) -> str:
    r"""A file's name as text: bytes that are no UTF-8 as `\xe9`, which any output can take."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def visible(text: str) -> str:
    r"""`printable` text with its control characters written out: `\x1b` for an escape.

    Line ends and tabs stay. A name in a stranger's file cannot colour, move or empty a terminal.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" or unicodedata.category(c) != "Cc" else ascii(c)[1:-1]
        for c in printable(text)
    )


def natural_order(name: str) -> tuple[int, int, str]:
    """Key to sort names by: whole numbers by their value, before all others."""
    number = name.isascii() and name.isdecimal() and len(name) < 20
    return (0, int(name), name) if number else (1, 0, name)


def decoded(data: bytes) -> str:
    """The text of a file in UTF-8, or as its byte order mark says (Notepad's, PowerShell's).

    Raises:
        UnicodeDecodeError: it is something else.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")
