"""What a file is that should have been a picture or a table, told from its first bytes."""

_STARTS = ((b"version https://git-lfs", "a Git LFS pointer: fetch the files with `git lfs pull`"),
           (b"<", "a web page or a server's error: download the files again, logged in where the site asks for it"),
           (b"\0\5\x16\7", "a Mac's AppleDouble file: delete it"),
           (b"pk\3\4", "a zip archive: unpack it"), (b"\x1f\x8b", "a gzip archive: unpack it"),
           (b"rar!", "a RAR archive: unpack it"), (b"%pdf", "a PDF"))


def kind_of(source: bytes) -> str:
    """'a Git LFS pointer ...', 'a web page ...', 'an empty file', 'a DICOM file ...' and the like; '' for anything else."""
    if not source.strip(b"\0 \r\n\t"):
        return "an empty file: copy or download it again"
    if source[128:132] == b"DICM":
        return "a DICOM file, which training reads not yet: convert it to PNG"
    start = source[:256].removeprefix(b"\xef\xbb\xbf").lstrip(b" \r\n\t").lower()
    return next((what for mark, what in _STARTS if start.startswith(mark)), "")
