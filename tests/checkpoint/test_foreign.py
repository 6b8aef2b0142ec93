"""Checkpoints and runs' folders that somebody else has made: every wrong type, range and name is one line."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moetrain import config
from moetrain.checkpoint import files, manifest
from moetrain.config import ConfigError
from moetrain.observe.collect import trace
from moetrain.report import build, read
from tests import made_run
from tests.checkpoint.test_checkpoint import agreed, saved

RANK_0 = "rank_00000.safetensors"


def with_manifest(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """A manifest that is changed so, with the checksum that belongs to it."""

    def damage(folder: Path) -> None:
        body = json.loads((folder / "manifest.json").read_text())
        del body["crc32"], body["format"]
        change(body)
        (folder / "manifest.json").unlink()
        manifest.write(folder, body)

    return damage


def stamped(folder: Path, name: str) -> None:
    with_manifest(lambda body: body["files"].update({name: files.stamp(folder / name)}))(folder)


def with_entries(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        entries = json.loads((folder / "entries.json").read_text())
        found = change(entries)
        (folder / "entries.json").write_text(found if isinstance(found, str) else json.dumps(entries))
        stamped(folder, "entries.json")

    return damage


def with_weight(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / RANK_0)
        found = change(tensors.pop("model/weight"))
        save_file(tensors | ({} if found is None else {"model/weight": found}), folder / RANK_0)
        stamped(folder, RANK_0)

    return damage


def with_header(header: bytes, size: int | None = None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / RANK_0).write_bytes((len(header) if size is None else size).to_bytes(8, "little") + header)
        stamped(folder, RANK_0)

    return damage


def outside(folder: Path) -> None:
    """A file of the right content, elsewhere; of it there is no checksum."""
    target = folder.parent / "elsewhere.safetensors"
    shutil.copy(folder / RANK_0, target)
    with_entries(lambda e: e["model/weight"][2][0].__setitem__(0, str(target)))(folder)


def set_piece(entries: dict, *numbers: Any) -> None:
    entries["model/weight"][2][0][1:] = numbers


MANIFEST, ENTRIES = "manifest.json is damaged", "entries.json is damaged"
PIECES = f"{ENTRIES}: model/weight must have ranges [file, begin, end] of its 21 elements, in their order"
NUMBERS = f"{ENTRIES}: model/weight must have whole numbers as its shape and ranges"
TRIPLE = f"{ENTRIES}: model/weight must be [dtype, shape, pieces]"
HEADER = b'{"model/weight":{"dtype":"F32","shape":[12],"data_offsets":[-48,0]}}'
FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no-object": (lambda p: (p / "manifest.json").write_text("[5]") and None, MANIFEST),
    "deep": (lambda p: (p / "manifest.json").write_text("[" * 100_000) and None, MANIFEST),
    "step": (with_manifest(lambda b: b.update(step="4")), f"{MANIFEST}: step: must be a valid integer"),
    "negative": (with_manifest(lambda b: b.update(samples=-1)), f"{MANIFEST}: samples: must be greater than or equal"),
    "layout": (with_manifest(lambda b: b.update(layout=[2])), f"{MANIFEST}: layout: must be"),
    "ranks": (with_manifest(lambda b: b["layout"].update(ranks=0)), f"{MANIFEST}: layout.ranks: must be greater"),
    "config": (with_manifest(lambda b: b.update(config=None)), f"{MANIFEST}: config: must be"),
    "section": (with_manifest(lambda b: b["config"].update(balance=5)), f"{MANIFEST}: config.balance: must be"),
    "stamp": (with_manifest(lambda b: b["files"].update({RANK_0: 5})), f"{MANIFEST}: files.{RANK_0}: must be"),
    "path": (with_manifest(lambda b: b["files"].update({"/etc/x": [1, "00000000"]})), f"{MANIFEST}: files./etc/x"),
    "up": (with_manifest(lambda b: b["files"].update({"../x": [1, "00000000"]})), f"{MANIFEST}: files.../x"),
    "list": (with_entries(lambda e: "[]"), ENTRIES),
    "deep-entries": (with_entries(lambda e: "[" * 100_000), ENTRIES),
    "text": (with_entries(lambda e: e.update({"model/weight": "F32"})), TRIPLE),
    "dtype": (with_entries(lambda e: e["model/weight"].__setitem__(0, "F31")), TRIPLE),
    "shape": (with_entries(lambda e: e["model/weight"].__setitem__(1, ["7", 3])), NUMBERS),
    "vast": (with_entries(lambda e: e["model/weight"].__setitem__(1, [1 << 60, 3])), NUMBERS),
    "truth": (with_entries(lambda e: set_piece(e, False, 12)), NUMBERS),
    "below": (with_entries(lambda e: set_piece(e, -3, 12)), NUMBERS),
    "beyond": (with_entries(lambda e: set_piece(e, 0, 99)), PIECES),
    "overlap": (with_entries(lambda e: e["model/weight"][2][1].__setitem__(1, 3)), PIECES),
    "pieces": (with_entries(lambda e: e["model/weight"][2].append(5)), PIECES),
    "outside": (outside, f"{ENTRIES}: model/weight must lie in safetensors files of this checkpoint, not /"),
    "json": (
        with_entries(lambda e: e["model/weight"][2][0].__setitem__(0, "costs.json")),
        f"{ENTRIES}: model/weight must lie in safetensors files of this checkpoint, not costs.json",
    ),
    "one-element": (with_weight(lambda w: w.view(-1)[:1].clone()), f"{RANK_0}: model/weight has 1 × torch.float32, 12"),
    "other-dtype": (with_weight(lambda w: w.to(torch.int32)), f"{RANK_0}: model/weight has 12 × torch.int32, 12 × F32"),
    "not-finite": (with_weight(lambda w: w / 0), f"{RANK_0}: model/weight has values that are not finite"),
    "without": (with_weight(lambda w: None), f"{RANK_0} cannot be read"),
    "giant-header": (with_header(b"{}", 1 << 60), f"{RANK_0} cannot be read"),
    "negative-offset": (with_header(HEADER), f"{RANK_0} cannot be read"),
    "no-tensors": (with_header(b"[" * 1000), f"{RANK_0} cannot be read"),
    "pipe": (lambda p: (p / RANK_0).unlink() or os.mkfifo(p / RANK_0), f"{RANK_0} is missing"),
}  # fmt: skip


def test_a_foreign_checkpoint_is_whole_or_named_in_one_line(pool, tmp_path: Path) -> None:
    """Every checksum is right: somebody means it. The run goes on from the one before."""
    pool.run(saved, 2, str(tmp_path), [2, 4])
    shutil.move(tmp_path / "checkpoints", tmp_path / "good" / "checkpoints")
    for name, (damage, _) in FOREIGN.items():
        shutil.copytree(tmp_path / "good", tmp_path / name)
        damage(tmp_path / name / "checkpoints" / "step_4")
    for found in pool.run(agreed, 2, str(tmp_path), "auto", ["good", *FOREIGN]):
        (start, notes), *others = found
        assert (start, notes) == ("step_4", [])
        for (start, notes), (name, (_, said)) in zip(others, FOREIGN.items(), strict=True):
            assert start == "step_2", (name, notes)
            (line,) = notes
            assert "\n" not in line
            bad = tmp_path / name / "checkpoints" / "step_4"
            assert line.startswith(f"{bad} is incomplete or damaged and is skipped: {said}"), line


def test_a_linked_step_is_read_and_its_target_stays(pool, tmp_path: Path) -> None:
    """Also where a link stands in the way of the next save."""
    pool.run(saved, 1, str(tmp_path / "."), [2])
    places = tmp_path / "checkpoints"
    (places / "step_2").rename(tmp_path / "archive")
    (places / "step_2").symlink_to(tmp_path / "archive")
    (places / ".step_9.gone").symlink_to(tmp_path / "archive")
    assert pool.run(agreed, 1, str(tmp_path), "auto", ["."]) == [[("step_2", [])]]
    assert pool.run(saved, 1, str(tmp_path), [3, 4, 5]) == [["step_2.damaged", "step_4", "step_5"]]
    assert manifest.problem(tmp_path / "archive") is None


BOMB = b"\n".join([b"a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]".encode() for n in range(1, 30))])
CONFIGS = [b"", b"\xff", b"5", b"a: [", b"[" * 10_000, b"run: 5", b"!!python/name:os.system {}", BOMB, b"run: &a [*a]"]


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_a_foreign_config_is_one_line(tmp_path: Path, text: bytes) -> None:
    """To `eval`, `generate` and `bench plan --trace`."""
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        config.load_resolved(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def giant(path: Path) -> None:
    """An array of 4 TiB, by its header."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (1 << 39,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("step.npy", header.getvalue())


def inflated(path: Path) -> None:
    """Zeros that take little room; by the directory, four GiB."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("step.npy", "w", force_zip64=True) as out,
    ):
        for _ in range(64):
            out.write(bytes(1 << 20))
    whole = path.read_bytes()
    at = whole.index(b"PK\x01\x02") + 24  # the size that the directory declares
    path.write_bytes(whole[:at] + (0xFFFFFF00).to_bytes(4, "little") + whole[at + 4 :])


HOSTILE: dict[str, Callable[[Path], object]] = {
    "config.yaml": lambda p: p.write_bytes(BOMB),
    "summary.json": lambda p: p.write_bytes(b'{"parameters":' * 50_000),
    "alerts.jsonl": os.mkfifo,
    "metrics.jsonl": lambda p: p.write_bytes(b"[" * 100_000 + b"\n5\n\xff\n"),
    "specialisation/step_99.json": os.mkfifo,
    "load_trace/part_00000.npz": giant,
    "load_trace/part_00001.npz": inflated,
    "load_trace/part_00002.npz": os.mkfifo,
    "load_trace/part_00003.npz": lambda p: np.savez(p, step=np.array([object()])),
}


def test_a_report_on_a_hostile_folder_ends_and_says_what_it_left_out(tmp_path: Path) -> None:
    run = made_run.write(tmp_path / "run")
    for name, make in HOSTILE.items():
        (run / name).unlink(missing_ok=True)
        make(run / name)
    missing = " ".join(read.RunData(run).missing)
    for name in HOSTILE:
        assert name in missing, (name, missing)
    build.write_of(run)
    assert trace.read(run)["step"].size == 0
