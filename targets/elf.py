"""Hide the inner symbols of a relocatable object, so that several models can be linked into one program.

Visibility alone does not do that: in a static library a hidden symbol still meets one of the same name in another
library. Here every defined symbol that is not kept becomes local, as with `objcopy --keep-global-symbol`, which no
pip-installable tool offers. 64-bit little-endian ELF only: x86-64 and AArch64.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_SYMTAB, _RELA, _REL, _GROUP, _SYMTAB_SHNDX = 2, 4, 9, 17, 18
_LLVM_ADDRSIG = 0x6FFF4C03  # lists symbols by index; a hint for the linker that may be dropped
_NULL = 0
_LOCAL, _DEFAULT = 0, 0
_UNDEFINED = 0
_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size


@dataclass(frozen=True)
class _Section:
    at: int  # of its header, in the file
    kind: int
    offset: int
    size: int
    link: int
    info: int


def _sections(data: bytes | bytearray) -> Iterator[_Section]:
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_bytes, count = struct.unpack_from("<HH", data, 0x3A)
    if count == 0:  # more than fit 16 bits: the first header's size holds the number
        (count,) = struct.unpack_from("<Q", data, table + 0x20)
    for index in range(count):
        at = table + index * entry_bytes
        _, kind, _, _, offset, size, link, info, _, _ = struct.unpack_from("<IIQQQQIIQQ", data, at)
        yield _Section(at, kind, offset, size, link, info)


def _name(data: bytes | bytearray, strings: _Section, offset: int) -> str:
    start = strings.offset + offset
    return data[start : data.index(0, start)].decode()


def global_symbols(data: bytes, *, defined: bool) -> list[str]:
    """Names that an object offers to others (defined), or needs from them (not defined); sorted."""
    sections = list(_sections(data))
    names = set()
    for table in (s for s in sections if s.kind == _SYMTAB):
        for at in range(table.offset, table.offset + table.size, _SYMBOL.size):
            name, info, _, section, _, _ = _SYMBOL.unpack_from(data, at)
            if info >> 4 != _LOCAL and (section != _UNDEFINED) == defined:
                names.add(_name(data, sections[table.link], name))
    return sorted(names)


def localise(data: bytes, keep: Callable[[str], bool]) -> bytes:
    """Make every defined symbol local for which `keep(name)` is false. References within the object stay bound."""
    out = bytearray(data)
    sections = list(_sections(out))
    tables = [index for index, s in enumerate(sections) if s.kind == _SYMTAB]
    assert len(tables) == 1, f"{len(tables)} symbol tables"
    table = sections[tables[0]]
    symbols = [_SYMBOL.unpack_from(data, at) for at in range(table.offset, table.offset + table.size, _SYMBOL.size)]

    def hidden(symbol: tuple[int, ...]) -> bool:
        name, info, _, section, _, _ = symbol
        return info >> 4 != _LOCAL and section != _UNDEFINED and not keep(_name(data, sections[table.link], name))

    # Local symbols have to come first, so all symbols get new numbers.
    local = [i for i, symbol in enumerate(symbols) if symbol[1] >> 4 == _LOCAL or hidden(symbol)]
    chosen = set(local)
    order = local + [i for i in range(len(symbols)) if i not in chosen]
    number = {old: new for new, old in enumerate(order)}
    for new, old in enumerate(order):
        name, info, other, section, value, size = symbols[old]
        if hidden(symbols[old]):
            info, other = info & 0xF, _DEFAULT
        _SYMBOL.pack_into(out, table.offset + new * _SYMBOL.size, name, info, other, section, value, size)
    struct.pack_into("<I", out, table.at + 0x2C, len(local))

    for section in sections:
        if section.kind == _LLVM_ADDRSIG:
            struct.pack_into("<I", out, section.at + 0x04, _NULL)
        elif section.link != tables[0]:
            continue
        elif section.kind == _RELA:
            for at in range(section.offset, section.offset + section.size, 24):
                kind, old = struct.unpack_from("<II", out, at + 8)
                struct.pack_into("<II", out, at + 8, kind, number[old])
        elif section.kind == _GROUP:
            # No longer one of several equal copies, of which the linker keeps one: its symbols are this object's own.
            struct.pack_into("<I", out, section.at + 0x2C, number[section.info])
            struct.pack_into("<I", out, section.offset, 0)
        elif section.kind == _SYMTAB_SHNDX:
            far = struct.unpack_from(f"<{len(symbols)}I", data, section.offset)
            struct.pack_into(f"<{len(symbols)}I", out, section.offset, *(far[old] for old in order))
        else:
            assert section.kind != _REL, "an x86-64 or AArch64 object has no relocations without addend"
    return bytes(out)
