"""Settings: TOML files and --key=value flags, later ones win, into frozen dataclasses.

    python train.py configs/a.toml configs/b.toml --attention=mqa --max_steps=100

A key is a field of one of the dataclasses that the entry point hands to `parse`. Its type and its one-line
explanation stand together, so `--help` can never disagree with the code:

    n_head: Annotated[int, "query heads"] = 12
"""

import dataclasses
import difflib
import os
import re
import reprlib
import sys
import tomllib
import typing
from pathlib import Path


class UserError(Exception):
    """A failure the user can mend: one line saying what was wrong, what was given and what to do."""


def run(main):
    """Run an entry point. What the user can mend becomes one line on stderr and exit code 2."""
    if sys.stdout is None:  # the first file that is opened would get its number, and what libraries print
        fail("stdout is closed; leave it open, or send it to /dev/null")
    sys.stdout.reconfigure(errors="replace")  # models write any character; a terminal that lacks one shows ?
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        sys.exit(1)  # the reader (`| head`) has gone: nothing to say, nobody to say it to
    except OSError as error:  # a full disk, a folder that may not be written, a file where a folder should be
        fail(f"{error.strerror or error}: {error.filename or 'while writing'}; mend that or name another place, then run again")
    except (MemoryError, RuntimeError) as error:  # torch has a type of its own on GPUs only, and not for all that fails there
        if not re.search("MemoryError|out of memory|allocate memory|ALLOC_FAILED|Storage size", repr(error)):
            raise
        said = ". ".join(str(error).partition("\n")[0].split(". ")[:2])  # torch goes on with a page of advice
        fail(
            f"out of memory ({said or 'MemoryError'}); free some or ask for less: a smaller model or batch, "
            f"micro_batch_size in training, num_pages or dtype in sampling, then run again"
        )
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def write_whole(path, content):
    """Write a text file that is whole at any moment: a full disk leaves the one before."""
    aside = path.with_suffix(".unfinished")
    try:
        aside.write_bytes(content.encode())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


class pathname(str):
    """The type of a setting that is a file or folder: a `~` at its beginning means the home folder, as it does where the
    shell replaces it, which it does not behind `--key=`."""


def parse(argv, *schemas, usage):
    """Read the command line against frozen dataclasses.

    argv:    arguments: `*.toml` files, `--key=value` flags (`--key` for a key that is true) and free words, in any order
    schemas: dataclasses; a key that two of them share is given to both
    usage:   what `--help` prints above the keys

    Returns (words, instance of each schema in order, ...). Raises UserError.
    """
    hints = {}
    for schema in schemas:
        hints.update(typing.get_type_hints(schema, include_extras=True))
    words, given = [], {}
    for argument in argv:
        if argument in ("-h", "--help"):
            print(help_text(schemas, usage))
            sys.exit(0)
        elif argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            hint = hint_of(key, hints)
            if not equals and explained(hint)[0] is bool:
                text = "true"
            elif not equals:
                raise UserError(f"--{key} has no value; write --{key}=VALUE ({takes(hint)})")
            given[key] = from_text(key, text, hint)
        elif argument.endswith(".toml"):
            for key, value in read_toml(argument).items():
                given[key] = checked(f"{key} (in {argument})", value, hint_of(key, hints, argument))
        elif argument.startswith("-"):
            raise UserError(f"unknown flag {argument}; flags are written --key=value, see --help")
        else:
            words.append(argument)
    return words, *(build(schema, given) for schema in schemas)


def build(schema, values):
    """An instance of the dataclass from those of the values that are its fields; its ValueErrors become UserErrors."""
    names = {field.name for field in dataclasses.fields(schema)}
    try:
        return schema(**{key: value for key, value in values.items() if key in names})
    except ValueError as error:
        raise UserError(str(error)) from None


def read_toml(path):
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        near = sorted(str(p) for p in Path(path).parent.glob("*.toml")) or ["none in that folder"]
        raise UserError(f"no settings file {path}; there are: {', '.join(near)}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, thousands of digits or brackets
        raise UserError(f"{path} is not TOML: {error}") from None


def hint_of(key, hints, path=None):
    """The annotated type of a key, or a UserError that names the nearest key there is."""
    if key in hints:
        return hints[key]
    near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)
    where = f" in {path}" if path else ""
    raise UserError(f"unknown key {key!r}{where}; the nearest is {near[0]!r} (see --help for all)")


def explained(hint):
    """Split Annotated[type, explanation] into (type, explanation)."""
    kind, explanation = typing.get_args(hint)
    return kind, explanation


def takes(hint):
    """What a key takes, in words: `int`, `true|false`, `mha|mqa|gqa|swa`."""
    kind, _ = explained(hint)
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(kind))
    return "true|false" if kind is bool else kind.__name__


def from_text(key, text, hint):
    """The value of a command-line flag."""
    kind, _ = explained(hint)
    value = text
    try:
        if kind is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif kind in (int, float):
            value = kind(text)
    except (KeyError, ValueError):
        raise wrong_type(key, text, hint) from None
    return checked(key, value, hint)


def checked(key, value, hint):
    """The value if it fits its type. An int passes for a float, and nothing else for anything else."""
    kind, _ = explained(hint)
    if type(value) is int and value.bit_length() > 1023:  # floats and printing have limits of their own
        raise UserError(f"{key} takes a number of at most 1023 bits, got one of {value.bit_length()}")
    if type(value) is str and "\0" in value:
        raise UserError(f"{key} takes text without the character NUL, got {value!r}")
    if typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind):
            return value
    elif kind is pathname and type(value) is str:
        return os.path.expanduser(value)
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    raise wrong_type(key, value, hint)


def wrong_type(key, value, hint):
    return UserError(f"{key} takes {takes(hint)}, got {reprlib.repr(value)}")  # its start, if it is long or deep


def help_text(schemas, usage):
    rows, seen = [], set()
    for schema in schemas:
        hints = typing.get_type_hints(schema, include_extras=True)
        rows.append((f"\n{schema.__name__.removesuffix('Config').lower()} keys, with [default]:", "", ""))
        for field in dataclasses.fields(schema):
            if field.name not in seen:
                seen.add(field.name)
                _, explanation = explained(hints[field.name])
                default = str(field.default).lower() if isinstance(field.default, bool) else repr(field.default)
                rows.append((f"  --{field.name}={takes(hints[field.name])}", f"[{default}]", explanation))
    wide, wider = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join([usage.strip()] + [f"{a:<{wide}}  {b:<{wider}}  {c}".rstrip(" ") for a, b, c in rows])
