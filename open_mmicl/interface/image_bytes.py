"""Image files as bytes: what is left of a file when all that is not pixels is taken out."""

import struct
import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_EXIF = b"eXIf"
_JPEG_START, _JPEG_SCAN, _JPEG_COMMENT = b"\xff\xd8", 0xDA, 0xFE
_JPEG_APP0, _JPEG_EXIF, _JPEG_ADOBE, _JPEG_APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_TIFF = {b"II*\0": "<", b"MM\0*": ">"}
_TIFF_BESIDE = (700, 33723, 34377, 34665, 34675, 34853, 40965)  # XMP, IPTC, Photoshop, Exif, ICC, GPS, interoperability
_TIFF_PRIVATE = 65000


def pixels_only(data: bytes) -> bytes | None:
    """The same picture without comments, profiles and other metadata; None where the format has none to take out.

    EXIF stays in PNG and JPEG, for the orientation. JPEG keeps what its colours depend on (JFIF, Adobe).
    """
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(_JPEG_START):
        return _jpeg(data)
    if data[:4] in _TIFF:
        return _tiff(data, _TIFF[data[:4]])
    return None


def _png(data: bytes) -> bytes:
    parts, at = [_PNG], len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        stop = at + 12 + length
        if kind in _PNG_KEPT:
            parts.append(data[at:stop])
        elif kind == _PNG_EXIF:  # its checksum does not count
            content = kind + data[at + 8 : stop - 4]
            parts.append(struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content)))
        at = stop
    return b"".join(parts)


def _jpeg(data: bytes) -> bytes:
    parts, at = [_JPEG_START], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == _JPEG_SCAN:
            break
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        beside = _JPEG_APP0 < marker <= _JPEG_APP15 and marker != _JPEG_ADOBE
        if marker == _JPEG_EXIF and data[at + 4 : at + 10] == b"Exif\0\0":
            beside = False
        if not beside and marker != _JPEG_COMMENT:
            parts.append(data[at:stop])
        at = stop
    return b"".join([*parts, data[at:]])


def _tiff(data: bytes, order: str) -> bytes | None:
    """Tags of metadata in the first directory get a number that nobody reads."""
    out = bytearray(data)
    try:
        (directory,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, directory)
        for i in range(count):
            at = directory + 2 + 12 * i
            if struct.unpack_from(order + "H", data, at)[0] in _TIFF_BESIDE:
                struct.pack_into(order + "H", out, at, _TIFF_PRIVATE + i)
    except struct.error:
        return None
    return bytes(out)
