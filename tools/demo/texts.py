"""The demo model's training texts: which packages they come from, how they are fetched, cleaned and
split.

All of it comes from Debian packages, because a package has a version and a copyright file: the
training data and its licences can be stated exactly. English, German and Russian are
largely the same manuals in translation, so that what separates these three domains is the language
and not the topic.
"""

import hashlib
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from moe_inspect.errors import MoeInspectError

DOCUMENT_CHARACTERS = (
    40_000  # longer files are cut here: variety is worth more than length to a small model
)
HELD_OUT_SHARE = 0.07


@dataclass(frozen=True)
class PackageFiles:
    """Files of one Debian package. `licence` is what the package's copyright file says about
    exactly these files."""

    domain: str
    package: str
    glob: str
    licence: str


SOURCES = (
    PackageFiles("english", "debian-handbook", "**/html/en-US/*.html", "GPL-2.0+ or CC-BY-SA-3.0"),
    PackageFiles("english", "installation-guide-amd64", "**/en/*.html", "GPL-2"),
    PackageFiles("english", "developers-reference", "**/*.html", "GPL-2"),
    PackageFiles("english", "anarchism", "**/html/*.html", "GPL-2"),
    PackageFiles("german", "debian-handbook", "**/html/de-DE/*.html", "GPL-2.0+ or CC-BY-SA-3.0"),
    PackageFiles("german", "installation-guide-amd64", "**/de/*.html", "GPL-2"),
    PackageFiles("german", "developers-reference-de", "**/*.html", "GPL-2"),
    PackageFiles("german", "debian-reference-de", "**/*.html", "GPL-2+"),
    PackageFiles("german", "maint-guide-de", "**/*.html", "GPL-2.0+"),
    PackageFiles("russian", "debian-handbook", "**/html/ru-RU/*.html", "GPL-2.0+ or CC-BY-SA-3.0"),
    PackageFiles("russian", "installation-guide-amd64", "**/ru/*.html", "GPL-2"),
    PackageFiles("russian", "developers-reference-ru", "**/*.html", "GPL-2"),
    PackageFiles("russian", "aptitude-doc-ru", "**/*.html", "GPL-2+"),
    PackageFiles("russian", "maint-guide-ru", "**/*.html", "GPL-2.0+"),
    PackageFiles("python", "libpython3.13-stdlib", "**/*.py", "PSF-2.0"),
    PackageFiles("c", "lttng-modules-dkms", "**/*.c", "LGPL-2.1 or GPL-2, by file"),
    PackageFiles("c", "libstb-dev", "**/*.h", "Expat or public domain"),
    PackageFiles("metamath", "metamath-databases", "**/set.mm", "CC0-1.0"),
)
DOMAINS = tuple(dict.fromkeys(source.domain for source in SOURCES))


def set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Function words decide a paragraph's language: translated manuals leave untranslated paragraphs in
# English.
FUNCTION_WORDS = {
    "english": set_of("the of and to is a in that for it be this you are with not or by as can on"),
    "german": set_of(
        "der die das und ist nicht sie ein eine zu den von für mit auf werden wird dem im des"
    ),
    "russian": set_of(
        "в и не на что для это с по как из или вы к о от если может быть при их он чтобы"
    ),
}


@dataclass(frozen=True)
class Texts:
    """Documents by domain, split by document. `versions`: the fetched version of each package,
    empty for own texts."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]
    versions: dict[str, str]


BLOCK_TAGS = set_of("p div li dd dt td th h1 h2 h3 h4 h5 h6 ul ol dl table tr body section br pre")
SKIPPED_TAGS = set_of("pre script style head")


class _Paragraphs(HTMLParser):
    """The running text of a page, cut at block tags: some manuals write their paragraphs as <p>,
    some as <div>."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs, self.skipping = [""], 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCK_TAGS:
            self.paragraphs.append("")
        self.skipping += tag in SKIPPED_TAGS

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCK_TAGS:
            self.paragraphs.append("")
        self.skipping = max(0, self.skipping - (tag in SKIPPED_TAGS))

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.paragraphs[-1] += data


def language(paragraph: str) -> str:
    """The language most of whose function words occur in the paragraph; "" where none does."""
    words = re.findall(r"\w+", paragraph.lower())
    counts = {name: sum(word in known for word in words) for name, known in FUNCTION_WORDS.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else ""


def prose(page: str, domain: str, seen: set[str]) -> Iterator[str]:
    """One document a page. `seen` drops the paragraphs that manuals repeat from page to page, which
    would otherwise appear on both sides of the split."""
    parser = _Paragraphs()
    parser.feed(page)
    kept: list[str] = []
    for paragraph in (" ".join(text.split()) for text in parser.paragraphs):
        if len(paragraph) >= 60 and paragraph not in seen and language(paragraph) == domain:
            seen.add(paragraph)
            kept.append(paragraph)
    yield "\n\n".join(kept)


def code(page: str, domain: str, seen: set[str]) -> Iterator[str]:
    """One document a file, without the licence comment that opens it: the same few lines in every
    file."""
    yield re.sub(r"\A(\s*(/\*.*?\*/|//[^\n]*\n|#[^\n]*\n))+", "", page, flags=re.DOTALL).lstrip()


def metamath(page: str, domain: str, seen: set[str]) -> Iterator[str]:
    """One document a section of the database. Long compressed proofs are letters that no model this
    small can predict; they become `?`, Metamath's own mark for a proof left out."""
    page = re.sub(r"\$=[^$]{500,}\$\.", "$= ? $.", page)
    for section in re.split(r"\n(?=\$\(\n(?:#\*#\*|=-=-|-\.-\.|#\*))", page):
        yield section.strip()


READERS: dict[str, Callable[[str, str, set[str]], Iterator[str]]] = {
    "english": prose,
    "german": prose,
    "russian": prose,
    "python": code,
    "c": code,
    "metamath": metamath,
}


def default_cache() -> Path:
    """Where fetched packages are kept between runs."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "moe-inspect"
        / "demo-texts"
    )


def fetch(package: str, cache: Path) -> tuple[Path, str]:
    """Downloads and unpacks a Debian package into the cache, without installing it: its folder and
    its version."""
    folder = cache / package
    if not (folder / "version").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.deb"):  # what an interrupted run left
            stale.unlink()
        try:
            subprocess.run(
                ["apt-get", "download", package],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            )
            (archive,) = folder.glob("*.deb")
            subprocess.run(
                ["dpkg-deb", "-x", archive, folder / "files"],
                check=True,
                capture_output=True,
                text=True,
            )
            field = ["dpkg-deb", "-f", archive, "Version"]
            version = subprocess.run(field, check=True, capture_output=True, text=True).stdout
        except FileNotFoundError as error:
            way_out = "the texts come out of Debian packages; give your own with --texts DIR"
            raise MoeInspectError(f"no {error.filename} on this system: {way_out}") from error
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip() or str(error)).splitlines()[-1]
            raise MoeInspectError(
                f"cannot fetch the Debian package {package}: run apt-get update ({reason})"
            ) from error
        archive.unlink()
        (folder / "version").write_text(version)
    return folder / "files", (folder / "version").read_text().strip()


def split(documents: list[str], domain: str, seed: int) -> tuple[list[str], list[str]]:
    """Train and held-out documents, at least one each. Whole documents, so that nothing held out
    was seen in part."""
    documents = list(dict.fromkeys(documents))
    if len(documents) < 2:
        raise MoeInspectError(
            f"the domain {domain} has {len(documents)} documents: it needs 2, one is held out"
        )
    digest = hashlib.sha256(f"{seed} {domain}".encode()).digest()
    random.Random(digest).shuffle(documents)
    wanted = HELD_OUT_SHARE * sum(map(len, documents))
    count = characters = 0
    while count < len(documents) - 1 and (count == 0 or characters < wanted):
        characters += len(documents[count])
        count += 1
    return documents[count:], documents[:count]


def load_packages(seed: int, cache: Path) -> Texts:
    """The texts of SOURCES, fetched where the cache lacks them."""
    documents: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    seen: dict[str, set[str]] = {domain: set() for domain in DOMAINS}
    versions: dict[str, str] = {}
    for source in SOURCES:
        folder, versions[source.package] = fetch(source.package, cache)
        for path in sorted(
            path for path in folder.glob(source.glob) if path.is_file() and not path.is_symlink()
        ):
            page = path.read_text(encoding="utf-8", errors="replace")
            found = READERS[source.domain](page, source.domain, seen[source.domain])
            documents[source.domain] += [
                text[:DOCUMENT_CHARACTERS] for text in found if len(text) >= 200
            ]
    return _split_all(documents, seed, versions)


def load_folder(folder: Path, seed: int) -> Texts:
    """Your own texts: one subfolder per domain, one .txt file per document."""
    documents = {
        sub.name: [path.read_text(encoding="utf-8") for path in sorted(sub.glob("*.txt"))]
        for sub in sorted(folder.glob("*/"))
    }
    if not documents:
        raise MoeInspectError(
            f"no domains in {folder}: it needs one subfolder of .txt files per domain"
        )
    return _split_all(documents, seed, {})


def _split_all(documents: dict[str, list[str]], seed: int, versions: dict[str, str]) -> Texts:
    halves = {domain: split(texts, domain, seed) for domain, texts in documents.items()}
    train = {domain: half[0] for domain, half in halves.items()}
    return Texts(train, {domain: half[1] for domain, half in halves.items()}, versions)
