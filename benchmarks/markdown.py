"""Tables in markdown, and their places in a file."""

from config import UserError, write_whole


def table(columns, pad=False):
    """{header: cells} as lines. A column without any text is left out. With pad its cells are as wide as its widest."""
    shown = {header: texts for header, texts in columns.items() if any(texts)}
    widths = [max(map(len, [header, *texts])) * pad for header, texts in shown.items()]
    lines = [shown, ["---"] * len(shown), *zip(*shown.values(), strict=True)]
    return [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]


def marked(name, text):
    """The text between the marks that say which program owns it."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    return f"{begin}\n{text}\n{end}"


def put_into(path, name, text):
    """Put the text between a file's marks of that name, in place of what is there."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}; save it as such, or name another file") from None
    begin, end = marked(name, "").splitlines()[::2]
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(end) < content.index(begin):
        raise UserError(f"{path} has no place for the table; add two lines: {begin} and {end}")
    write_whole(path.resolve(), content.split(begin)[0] + marked(name, text) + content.split(end)[1])  # a link stays one
