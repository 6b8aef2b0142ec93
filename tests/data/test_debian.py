"""The corpus out of Debian packages, from packages made here: no network, no tools of Debian's."""

import gzip
import io
import os
import random
import tarfile
import tempfile
from pathlib import Path

import pytest

from moetrain import config
from moetrain.config import ConfigError, Data
from moetrain.data import debian, prepare
from moetrain.data.loader import Corpus

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def package(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A .deb file: an `ar` archive of three members."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(f"./{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": archive.getvalue()}
    with (folder / f"{name}_1%3a2.0-1_all.deb").open("wb") as out:
        out.write(b"!<arch>\n")
        for member, content in members.items():
            out.write(f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            out.write(content + b"\n" * (len(content) % 2))


def prose(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join(f"{draw.choice(WORDS)}{draw.randrange(100)}" for _ in range(count))


PATHS = {
    "fortunes": "usr/share/games/fortunes/{}",
    "anarchism": "usr/share/doc/anarchism/markdown/{}.md",
    "rust-src": "usr/src/rustc-1.63.0/library/core/{}.rs",
    "sbcl-source": "usr/share/sbcl-source/src/{}.lisp",
    "perl-doc": "usr/share/perl/5.36.0/pod/{}.pod",
    "dict-gcide": "usr/share/dictd/gcide.dict.dz",
    "trans-de-en": "usr/share/trans/de-en",
    "metamath-databases": "usr/share/metamath/databases/{}.mm",
    "iso-codes": "usr/share/iso-codes/json/iso_{}.json",
    "edict": "usr/share/edict/edict",
}


def path_of(name: str) -> str:
    kind, _, language = name.partition("-")
    language = language.removesuffix("-dev").removesuffix("dev")
    if kind == "manpages":
        place = {"": "", "zh": "zh_CN/"}.get(language, f"{language}/")
        return f"usr/share/man/{place}man{3 if name.endswith('dev') else 1}/{{}}.gz"
    return PATHS.get(name, f"usr/share/games/fortunes/{language}/{{}}".replace("/zh/", "/"))


def whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        package(Path(folder), "any", {"usr/text": random.Random(0).randbytes(5000)})
        return next(Path(folder).iterdir()).read_bytes()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for number, name in enumerate(debian.PACKAGES):
        path = path_of(name)
        files = {}
        for part in range(4 if "{}" in path else 1):
            text = prose(number * 10 + part, 60 if "{}" in path else 60_000)
            if path == PATHS["trans-de-en"]:
                text = text.replace("a1 ", "a1\n")
            encoded = text.replace(" beta", "\n\nbeta").replace("kappa", "\nカッパ").encode("utf-8")
            if name == "edict":
                encoded = ("\n".join(f"亜 {line}" for line in text.split(" gamma"))).encode("euc_jp")
            files[path.format(f"page{part}")] = gzip.compress(encoded) if path.endswith(("gz", "dz")) else encoded
        files["usr/share/doc/copyright"] = b"not a document of any domain" * 20
        package(folder, name, files)
    return folder


def options(packages: Path, out: Path, *more: str) -> Data:
    return config.load(["data=debian", f"data.path={packages}", f"data.dir={out}", "data.vocab_size=600", *more]).data


def test_every_domain_comes_out_of_its_packages(packages: Path, tmp_path: Path) -> None:
    chosen = options(packages, tmp_path, "data.max_bytes_per_domain=60000")
    corpus = Corpus(prepare.ensure(chosen))
    assert corpus.domains == sorted(debian.DOMAINS)
    assert len(corpus.domains) == 15
    for split in prepare.SPLITS:
        assert all(count > 50 for count in corpus.manifest["splits"][split]["tokens_per_domain"].values())
    assert corpus.manifest["packages"] == dict.fromkeys(debian.PACKAGES, "1:2.0-1")
    texts = [text for _, text in debian.texts(chosen)]
    assert not any("not a document" in text for text in texts)
    assert any("亜" in text for text in texts)


def test_long_files_are_cut_at_their_borders(packages: Path, tmp_path: Path) -> None:
    found = [text for domain, text in debian.texts(options(packages, tmp_path)) if domain == "german_english"]
    assert len(found) > 5
    assert all(len(text) < 2 * debian.PART for text in found)
    (original,) = debian._files(packages / "trans-de-en_1%3a2.0-1_all.deb", "usr/share/trans/de-en")
    assert sorted("\n".join(found).split("\n")) == sorted(original[1].decode().split("\n"))


def test_manual_pages_lose_their_commands() -> None:
    page = rb""".\" a comment
.TH LS 1
.SH NAME
ls \- \fBlist\fR the \(lqfiles\(rq
.TP
\fB\-a\fP, \fI\,all\/\fP
it\(aqs \*(Aqall\*(Aq
"""
    text = debian._text("usr/share/man/man1/ls.1.gz", gzip.compress(page), "utf-8")
    assert text == "NAME\nls - list the “files”\n\n-a, all\nit's all\n"


def test_packages_that_are_not_there_are_named(packages: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "edict_1_all.deb").write_bytes((packages / "edict_1%3a2.0-1_all.deb").read_bytes())
    with pytest.raises(ConfigError, match=r"must hold the packages fortunes, anarchism, .*fortunes-zh, manpages-zh as"):
        prepare.ensure(options(tmp_path / "few", tmp_path / "out"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"data.source=debian: needs apt-get, which this host does not have; data=local and"
    ):
        prepare.ensure(config.load(["data=debian", f"data.dir={tmp_path}/out"]).data)
    assert not [*(tmp_path / "out").glob("debian*/*")]


def test_what_apt_get_says_is_passed_on(tmp_path: Path, monkeypatch) -> None:
    """A program of that name which fails as apt-get does, after one package: that one is kept."""
    program = tmp_path / "apt-get"
    program.write_text('#!/bin/sh\necho half > "$3_1_all.deb"\necho "W: odd" >&2\necho "E: no network" >&2\nexit 100\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    chosen = config.load(["data=debian", f"data.dir={tmp_path}/out"]).data
    with pytest.raises(ConfigError, match=r"apt-get download failed \(no network\); data=local"):
        prepare.ensure(chosen)
    assert [path.name for path in (tmp_path / "out" / "debian-packages").iterdir()] == ["fortunes_1_all.deb"]


@pytest.mark.parametrize("content", [b"", b"not an archive of any kind" * 9, b"!<arch>\n", whole()[:-200]])
def test_a_file_that_is_no_package_is_named(tmp_path: Path, content: bytes) -> None:
    for name in debian.PACKAGES:
        (tmp_path / f"{name}_1_all.deb").write_bytes(content)
    with pytest.raises(ConfigError, match=r"fortunes_1_all\.deb: must be a whole Debian package"):
        next(debian.texts(options(tmp_path, tmp_path)))
