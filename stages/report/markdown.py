"""Pieces of Markdown, for a git host."""


def bullets(lines: list[str]) -> str:
    """Return a list, an item a line."""
    return "\n".join(f"- {line}" for line in lines)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table: the first column to the left, numbers in the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tabulate_first(header: list[str], rows: list[list[str]], most: int, file: str) -> str:
    """Return a table of the first rows, and of how many more there are in a file."""
    more = [[f"... {len(rows) - most:,} more in `{file}`", *[""] * (len(header) - 1)]] * (len(rows) > most)
    return table(header, [*rows[:most], *more])


def cell(text: str) -> str:
    """Let no name of a class or a file be taken for Markdown or for the end of a table's cell."""
    escaped = "".join(f"\\{character}" if character in r"\`*_{}[]<>#|~$&" else character for character in text)
    return " ".join(escaped.split())


def code(value: object) -> str:
    """Write a parameter's value as code; within a table's cell a bar has to be escaped even there."""
    text = "null" if value is None else str(value)
    return f"`` {text} ``".replace("|", "\\|") if "`" in text else f"`{text}`".replace("|", "\\|")
