"""Where benchmarks are: known names, the folders that are searched, the layouts that are understood."""

import difflib
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lrface.errors import LrfaceError, UsageError

DEFAULT_ROOT = Path("~/.cache/lrface")
PAIRS_NAME = "pairs.txt"
INDEX_NAME = "index.json"
IMAGE_FOLDERS = ("images", "lfw-deepfunneled", "lfw_funneled", "lfw", ".")
"""Where the identity folders of a folder benchmark may be, relative to it; the first that exists is taken."""

_EMORE = "InsightFace's training package faces_emore (its dataset zoo lists it)"
_WEBFACE = (
    "InsightFace's training packages faces_webface_112x112 and faces_emore (its dataset zoo lists both)"
)


@dataclass(frozen=True)
class KnownBenchmark:
    """A benchmark that has a name: its pack's file name, other spellings, and where one gets it."""

    name: str
    title: str
    pack: str
    package: str
    aliases: tuple[str, ...] = ()
    photographs: bool = False


KNOWN_BENCHMARKS = {
    known.name: known
    for known in (
        KnownBenchmark("lfw", "Labeled Faces in the Wild, View 2", "lfw.bin", _WEBFACE, photographs=True),
        KnownBenchmark("agedb30", "AgeDB-30", "agedb_30.bin", _WEBFACE, aliases=("agedb",)),
        KnownBenchmark("cfp_fp", "CFP, frontal against profile", "cfp_fp.bin", _WEBFACE, aliases=("cfp",)),
        KnownBenchmark("cfp_ff", "CFP, frontal against frontal", "cfp_ff.bin", _EMORE),
        KnownBenchmark("calfw", "Cross-Age LFW", "calfw.bin", _EMORE),
        KnownBenchmark("cplfw", "Cross-Pose LFW", "cplfw.bin", _EMORE),
        KnownBenchmark("vgg2_fp", "VGGFace2, frontal against profile", "vgg2_fp.bin", _EMORE),
    )
}


@dataclass(frozen=True)
class FoundBenchmark:
    """A benchmark on disk.

    Attributes:
        name: what rows of a result are called.
        kind: ``"pack"`` (an InsightFace .bin), ``"packed"`` (a packed directory and a pairs file) or
            ``"folder"`` (identity folders of image files and a pairs file).
        path: the pack, the packed directory, or the folder that holds the identity folders.
        pairs: the pairs file; None for a pack.
    """

    name: str
    kind: str
    path: Path
    pairs: Path | None = None


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


_BY_KEY = {
    _key(spelling): known
    for known in KNOWN_BENCHMARKS.values()
    for spelling in (known.name, known.pack, Path(known.pack).stem, *known.aliases)
}


def data_roots(
    data: str | Path | None = None, environment: Mapping[str, str] | None = None
) -> list[tuple[str, Path]]:
    """The folders that are searched for data, in order, each with what it comes from.

    First ``data`` (the flag ``--data``), then ``$LRFACE_DATA``, then ``~/.cache/lrface``.

    Raises:
        UsageError: ``data`` is given and is no folder.
    """
    variables = os.environ if environment is None else environment
    roots: list[tuple[str, Path]] = []
    if data is not None:
        folder = Path(data).expanduser()
        if not folder.is_dir():
            what = (
                "is a file; name the file itself with --benchmark" if folder.is_file() else "does not exist"
            )
            raise UsageError(f"--data {folder}: a folder is expected, and this {what}")
        roots.append(("--data", folder))
    if variables.get("LRFACE_DATA"):
        roots.append(("$LRFACE_DATA", Path(variables["LRFACE_DATA"]).expanduser()))
    roots.append((str(DEFAULT_ROOT), DEFAULT_ROOT.expanduser()))
    return roots


def cache_root(cache: str | Path | None = None) -> Path:
    """Where derived data is kept: ``cache``, else ``$LRFACE_CACHE``, else ``~/.cache/lrface``."""
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("LRFACE_CACHE") or DEFAULT_ROOT).expanduser()


def known_benchmark(name: str) -> KnownBenchmark | None:
    """The known benchmark of that name; case, hyphens and underscores do not matter (agedb_30, CFP-FP)."""
    return _BY_KEY.get(_key(name)) if _key(name) else None


def describe_layouts() -> str:
    """The layouts of a benchmark folder, for messages and help."""
    return (
        "A benchmark is a known name "
        f"({', '.join(KNOWN_BENCHMARKS)}), or a path to one of:\n"
        "  FILE.bin                  an InsightFace verification pack\n"
        "  FOLDER/pairs.txt          pairs in LFW's format, beside\n"
        "    FOLDER/images/NAME/NAME_0001.jpg   photographs, or aligned crops of 112x112 pixels\n"
        "    FOLDER/NAME/NAME_0001.jpg          the same without the folder images\n"
        "    FOLDER/index.json                  packed data (lrface align PHOTOGRAPHS FOLDER)"
    )


def _looks_like_path(text: str) -> bool:
    return (
        os.sep in text or "/" in text or text.startswith((".", "~")) or Path(text).suffix in (".bin", ".txt")
    )


def locate_benchmark(
    benchmark: str | Path, data: str | Path | None = None, pairs: str | Path | None = None
) -> FoundBenchmark:
    """Find a benchmark by name or path.

    ``lfw.bin`` without a folder means that pack, wherever it is found. A known name wins over a folder of the
    same name in the current directory (write ``./lfw`` for the folder). ``pairs`` names the pairs file where
    it is not ``pairs.txt`` beside the images.

    Raises:
        UsageError: an unknown name, a path that does not exist, or a folder of no known layout.
        LrfaceError: a known benchmark that is in none of the places searched; the message names them all, the
            file to put there and a command.
    """
    pairs_file = None if pairs is None else Path(pairs).expanduser()
    if pairs_file is not None and not pairs_file.is_file():
        raise UsageError(f"--pairs {pairs_file}: no such file")
    text = str(benchmark)
    if isinstance(benchmark, str) and not _looks_like_path(text):
        known = known_benchmark(text)
        if known is not None:
            return _locate_known(known, data, pairs_file)
    path = Path(text).expanduser()
    if path.exists():
        return _locate_path(path, pairs_file)
    known = next((each for each in KNOWN_BENCHMARKS.values() if each.pack == text), None)
    if known is not None:
        return _locate_known(known, data, pairs_file, pack_only=True)
    if _looks_like_path(text) or isinstance(benchmark, Path):
        raise UsageError(f"--benchmark {path}: no such file or folder.\n{describe_layouts()}")
    spellings = {_key(name): name for name in KNOWN_BENCHMARKS} | {
        key: known.name for key, known in _BY_KEY.items()
    }
    nearest = list(
        dict.fromkeys(
            spellings[match] for match in difflib.get_close_matches(_key(text), list(spellings), 3, 0.5)
        )
    )
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    raise UsageError(f"--benchmark {text}: no known benchmark and no path.{hint}\n{describe_layouts()}")


def _locate_path(path: Path, pairs: Path | None) -> FoundBenchmark:
    name = path.resolve().stem if path.is_file() else path.resolve().name
    if path.is_file():
        if path.suffix != ".bin":
            raise UsageError(
                f"--benchmark {path}: a file is expected to be a verification pack "
                f"(.bin).\n{describe_layouts()}"
            )
        if pairs is not None:
            raise UsageError(f"--pairs {pairs}: the pack {path} holds its own pairs; leave --pairs out")
        return FoundBenchmark(name, "pack", path)
    found = _folder(path, name, pairs)
    if found is None:
        packs = sorted(child.name for child in path.glob("*.bin"))
        if packs:
            hint = f"it holds the packs {', '.join(packs)}; name one, for example {path / packs[0]}"
        elif (path / INDEX_NAME).is_file():
            hint = (
                f"it is packed data without {PAIRS_NAME}; put the pairs there, or name them with --pairs FILE"
            )
        elif (path / PAIRS_NAME).is_file():
            hint = f"it has {PAIRS_NAME}, but no identity folders of images"
        else:
            hint = f"it has no {PAIRS_NAME}"
        raise UsageError(f"--benchmark {path}: not a benchmark folder: {hint}.\n{describe_layouts()}")
    return found


def _folder(path: Path, name: str, pairs: Path | None) -> FoundBenchmark | None:
    """The benchmark in a folder, None when its layout is not known."""
    pairs_file = pairs if pairs is not None else path / PAIRS_NAME
    if not pairs_file.is_file():
        return None
    if (path / INDEX_NAME).is_file():
        return FoundBenchmark(name, "packed", path, pairs_file)
    for candidate in IMAGE_FOLDERS:
        images = path / candidate
        if (images / INDEX_NAME).is_file():
            return FoundBenchmark(name, "packed", images, pairs_file)
        if images.is_dir() and any(child.is_dir() for child in images.iterdir()):
            return FoundBenchmark(name, "folder", images, pairs_file)
    return None


def _locate_known(
    known: KnownBenchmark, data: str | Path | None, pairs: Path | None, pack_only: bool = False
) -> FoundBenchmark:
    roots = data_roots(data)
    looked: list[str] = []
    for _, root in roots:
        folder_names = () if pack_only else dict.fromkeys((known.name, Path(known.pack).stem))
        for folder_name in folder_names:
            folder = root / folder_name
            looked.append(f"{folder / PAIRS_NAME} with {folder / 'images'} or {folder / INDEX_NAME}")
            if folder.is_dir():
                found = _folder(folder, known.name, pairs)
                if found is not None:
                    return found
        for pack in dict.fromkeys((root / known.pack, root / known.name / known.pack)):
            looked.append(str(pack))
            if pack.is_file():
                if pairs is not None:
                    raise UsageError(
                        f"--pairs {pairs}: the pack {pack} holds its own pairs; leave --pairs out"
                    )
                return FoundBenchmark(known.name, "pack", pack)
    raise LrfaceError(_missing(known, roots, looked))


def _missing(known: KnownBenchmark, roots: list[tuple[str, Path]], looked: list[str]) -> str:
    root = roots[0][1]
    quoted = shlex.quote(str(root))
    lines = [f"benchmark {known.name} ({known.title}) was not found. Looked for:"]
    lines += [f"  {place}" for place in looked]
    if not any(origin == "$LRFACE_DATA" for origin, _ in roots):
        lines.append("  ($LRFACE_DATA is not set)")
    if known.photographs:
        lines += [
            "Get lfw-deepfunneled.tgz and pairs.txt (View 2) from the authors' site, Labeled Faces in the "
            "Wild of the "
            "University of Massachusetts, and run where they are:",
            f"  mkdir -p {quoted}/lfw/images && tar -xzf lfw-deepfunneled.tgz --strip-components=1 -C "
            f"{quoted}/lfw/images && cp pairs.txt {quoted}/lfw/",
            f"Or, already aligned: {known.pack} out of {known.package}:",
        ]
    else:
        lines.append(f"Get {known.pack} out of {known.package}, and run where it is:")
    lines += [
        f"  mkdir -p {quoted} && cp {known.pack} {quoted}/",
        "Where it lies elsewhere, name that folder:",
        f"  lrface verify --benchmark {known.name} --data FOLDER --model MODEL",
    ]
    return "\n".join(lines)
