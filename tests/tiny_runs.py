"""Runs that take milliseconds a step: the demo's recipe with a width of 32, and shards of a made-up language."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt.data.embedded import embedded_corpus
from nanogpt.data.shards import train_name, val_name, write_tokens
from nanogpt.data.tokenizer import BOS as GPT2_BOS
from nanogpt.data.tokenizer import encode_text
from nanogpt.recipe import dump_spec, load_recipe
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.metrics import RunMetrics, read_run
from nanogpt.spec import RunSpec
from nanogpt.training.checkpoint import load_newest_checkpoint
from nanogpt.training.trainer import Result, train_run

VOCABULARY = 64
BOS = VOCABULARY - 1

# Twelve steps: stages of 4, 3, 3 and 2. Both an even and an odd step start a stage; the head is split after step 7.
SPEEDRUN = (
    "name=tiny",
    f"model.vocab_size={VOCABULARY}",
    f"model.padded_vocab_size={VOCABULARY}",
    "model.layers=4",
    "model.width=32",
    "model.heads=4",
    "model.head_dim=8",
    "model.mlp_bank_padding=2",
    "model.attention_free_layers=[2]",
    "model.long_window_layers=[1]",
    "model.paired_layers=[0]",
    "model.value_embed_layers=[0, 3]",
    "model.skip={from_layer: 1, to_layer: 2}",
    "model.backout_layer=2",
    "model.rotary.frequencies=2",
    "model.mlp_expansion=2",
    "model.bigram_rows=128",
    "optimizer.normuon.momentum={low: 0.85, high: 0.95, warmup_steps: 4, cooldown_steps: 2}",
    "training.slots=4",
    "training.max_document_tokens=48",
    "training.window_block=4",
    "training.stages=["
    "{steps: 4, batch_tokens: 256, window_blocks: {short: 2, long: 4}, token_weights: [1, 0.5, 0.25], lr_factor: 1},"
    "{steps: 3, batch_tokens: 320, window_blocks: {short: 3, long: 6}, token_weights: [1, 0.5], lr_factor: 1.52},"
    "{steps: 3, batch_tokens: 512, window_blocks: {short: 4, long: 9}, token_weights: [1], lr_factor: 1.73}]",
    "training.extension={steps: 2, batch_tokens: 512, window_blocks: {short: 4, long: 10}, token_weights: [1],"
    " lr_factor: 1.73}",
    "training.final_window_blocks={short: 4, long: 16}",
    "evaluation={every: 5, tokens: 256, micro_batch_tokens: 64, target_loss: null}",
    f"data={{bos: {BOS}, epochs: null}}",
    "checkpoint={at_end: false}",
)
SPEEDRUN_STEPS = 12

# The same twelve steps of record 89's model. Its tokens start at 256: from there on GPT-2's have prefixes.
FIRST_WITH_PREFIX = 256
RECORD89 = (
    "name=tiny-record89",
    f"model.vocab_size={FIRST_WITH_PREFIX + VOCABULARY}",
    f"model.padded_vocab_size={FIRST_WITH_PREFIX + VOCABULARY}",
    "model.layers=5",
    *(setting for setting in SPEEDRUN if setting.startswith(("model.width", "model.heads", "model.head_dim"))),
    "model.qk_bank_padding=0",
    "model.vo_bank_padding=0",
    "model.mlp_bank_padding=1",
    "model.attention_free_layers=[2]",
    "model.long_window_layers=[1, 4]",
    "model.paired_layers=[0]",
    "model.value_embed_layers=[1, 4]",
    "model.xsa_layers=[1, 3]",
    "model.output_gate_layers=[1, 4]",
    "model.skip={from_layer: 1, to_layer: 2}",
    "model.saved_layer=2",
    "model.dc_window=6",
    "model.rotary.frequencies=2",
    "model.mlp_expansion=2",
    "model.bigram_rows=128",
    "model.bigram_signs=16",
    "model.mudd.hidden=8",
    "model.mlp_fp8.bootstrap_steps=3",
    "optimizer.normuon.momentum={low: 0.85, high: 0.95, warmup_steps: 4, cooldown_steps: 2}",
    "training.slots=4",
    "training.max_document_tokens=48",
    "training.window_block=4",
    "training.stages=["
    "{steps: 4, batch_tokens: 256, window_blocks: {short: 2, long: 4}, token_weights: [1, 0.5, 0.25], lr_factor: 1,"
    " prefix_weight: {first: 0.25, last: 0.25}, max_document_tokens: 20, max_documents: 63},"
    "{steps: 3, batch_tokens: 320, window_blocks: {short: 3, long: 6}, token_weights: [1, 0.5], lr_factor: 1.52,"
    " prefix_weight: {first: 0.25, last: 0}, max_documents: 95},"
    "{steps: 3, batch_tokens: 512, window_blocks: {short: 4, long: 9}, token_weights: [1], lr_factor: 1.73}]",
    "training.extension={steps: 2, batch_tokens: 512, window_blocks: {short: 4, long: 10}, token_weights: [1],"
    " lr_factor: 1.73}",
    "training.final_window_blocks={short: 4, long: 16}",
    "training.warmup=false",
    "evaluation={every: 5, tokens: 256, micro_batch_tokens: 64, target_loss: null}",
    f"data={{bos: {FIRST_WITH_PREFIX + BOS}, epochs: null}}",
    "hardware={gpu: cpu, gpus_per_node: 1}",
    "runtime={dtype: fp32}",
    "checkpoint={at_end: false}",
)

# The same twelve steps of record 92's model, with all of its layers. The table's updates are steps 1, 3, 7 and 11.
RECORD92 = (
    "name=tiny-record92",
    f"model.vocab_size={FIRST_WITH_PREFIX + VOCABULARY}",
    f"model.padded_vocab_size={FIRST_WITH_PREFIX + VOCABULARY}",
    *(setting for setting in SPEEDRUN if setting.startswith(("model.width", "model.heads", "model.head_dim"))),
    "model.narrow_head_dim=4",
    "model.half_value_dim=4",
    "model.mlp_width=48",
    "model.qk_bank_padding=4",
    "model.vo_bank_padding=2",
    "model.group_channels=8",
    "model.ngram_rows=256",
    "model.ngram_signs=16",
    "model.rotary.frequencies=2",
    "model.mudd.hidden=8",
    "model.mlp_fp8.bootstrap_steps=3",
    "optimizer.anvil.momentum={low: 0.85, high: 0.93, warmup_steps: 4, cooldown_steps: 2}",
    "optimizer.anvil.slow_momentum.from_step=6",
    "optimizer.tables={every: 2, then_every: 4, from_step: 4}",
    "optimizer.tied_head.split_stage=3",
    "training.slots=8",
    "training.max_document_tokens=48",
    "training.window_block=4",
    "training.stages=["
    "{steps: 4, batch_tokens: 256, window_blocks: {short: 2, long: 4}, token_weights: [1, 0.5, 0.25], lr_factor: 1,"
    " prefix_weight: {first: 0.25, last: 0.25}, candidates: 48, max_document_tokens: 20, max_documents: 63},"
    "{steps: 3, batch_tokens: 384, window_blocks: {short: 3, long: 6}, token_weights: [1, 0.5], lr_factor: 1.52,"
    " prefix_weight: {levels: [0.2, 0.1]}, candidates: 64, max_documents: 95},"
    "{steps: 3, batch_tokens: 512, window_blocks: {short: 4, long: 9}, token_weights: [1], lr_factor: 1.73,"
    " max_segment_tokens: 24}]",
    "training.extension={steps: 2, batch_tokens: 384, window_blocks: {short: 5, long: 10}, token_weights: [1],"
    " lr_factor: 1.73, max_segment_tokens: 24}",
    "training.end=[{kind: tail_averages, averages: ["
    "{blend: {lm_head: 0.65, embed: 0.65}, window_steps: 5, every: 2, also: [4], rate: 0.3, last_rate: 0.2},"
    "{blend: {vo: 1, mlp: 1}, window_steps: 5, every: 4, rate: 0.4},"
    "{blend: {value_embed: 1}, window_steps: 9, every: 4, rate: 0.4},"
    "{blend: {qk: 0.55, vo: 0.3493, mlp: 0.3493}, window_steps: 5, every: 4, also: [1], rate: 0.3}],"
    " keep_norms: [embed, lm_head, mlp, qk, vo]}]",
    "training.final_window_blocks={short: 5, long: 16}",
    "training.warmup=false",
    "evaluation={every: 5, tokens: 512, micro_batch_tokens: 64, target_loss: null}",
    f"data={{bos: {FIRST_WITH_PREFIX + BOS}, epochs: null}}",
    "hardware={gpu: cpu, gpus_per_node: 1}",
    "runtime={dtype: fp32}",
    "checkpoint={at_end: false}",
)

# Trains record 89's with record 92's optimizer: the blend and the cadence of four steps start on the way.
ANVIL = (
    "optimizer={kind: anvil_adam, adam: {lr: 0.008, eps: 1e-10, weight_decay: 0.005, every: 2},"
    " anvil: {lr: 0.023, beta2: 0.9, weight_decay: 2.25, norm_margin: 1.06,"
    " momentum: {low: 0.85, high: 0.93, warmup_steps: 4, cooldown_steps: 2},"
    " slow_momentum: {beta: 0.98, from_step: 6, fast_share: 0.4385, fast_beta: 0.85},"
    " polar_express: [[3.923798038567, -6.095026865488, 3.905234618423],"
    " [3.278126713798, -3.328923386476, 0.989127286973], [3.505298394150, -5.137358782410, 1.968325560615],"
    " [2.815058591845, -3.685181239622, 1.417196497642], [2.245503932403, -2.443826979899, 0.963091710461],"
    " [2.256537145403, -2.166840097229, 0.929501253245]]}, tied_head: {split_stage: 2},"
    " tables: {every: 2, then_every: 4, from_step: 4, groups: [value_embed, bigram_embed]}}",
)

# The speedrun in sizes that the GPU's kernels take, every stage, with warm-up.
GPU_SIZES = (
    "model.width=128",
    "model.heads=4",
    "model.head_dim=32",
    "model.rotary.frequencies=8",
    "training.stages=["
    "{steps: 4, batch_tokens: 4096, window_blocks: {short: 2, long: 4}, token_weights: [1, 0.5, 0.25], lr_factor: 1},"
    "{steps: 3, batch_tokens: 6144, window_blocks: {short: 3, long: 6}, token_weights: [1, 0.5], lr_factor: 1.52},"
    "{steps: 3, batch_tokens: 8192, window_blocks: {short: 4, long: 9}, token_weights: [1], lr_factor: 1.73}]",
    "training.extension={steps: 2, batch_tokens: 8192, window_blocks: {short: 4, long: 10}, token_weights: [1],"
    " lr_factor: 1.73}",
    "training.max_document_tokens=512",
    "training.warmup=true",
    "evaluation={every: 3, tokens: 16384, micro_batch_tokens: 2048, target_loss: null}",
    "checkpoint={every: 5, at_end: true}",
)

# Nine steps of one stage, with AdamW.
GPT2 = (
    "name=tiny-gpt2",
    f"model.vocab_size={VOCABULARY}",
    f"model.padded_vocab_size={VOCABULARY}",
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "optimizer.lr=0.01",
    "training.max_document_tokens=48",
    "training.slots=4",
    "training.window_block=32",
    "training.stages=["
    "{steps: 9, batch_tokens: 256, window_blocks: {short: 1, long: 1}, token_weights: [1], lr_factor: 1}]",
    "training.final_window_blocks={short: 1, long: 1}",
    "training.lr_schedule.warmup_steps=3",
    "training.warmup=false",
    "evaluation={every: 4, tokens: 256, micro_batch_tokens: 64, target_loss: null}",
    f"data={{bos: {BOS}, epochs: null}}",
    "hardware={gpu: cpu, gpus_per_node: 1}",
    "runtime={dtype: fp32}",
    "checkpoint={at_end: false}",
)


def tiny_spec(*overrides: str, model: str = "speedrun") -> RunSpec:
    """A spec of the tiny run, `model` being speedrun, record89, record92 or gpt2."""
    settings = {"speedrun": SPEEDRUN, "record89": RECORD89, "record92": RECORD92, "gpt2": GPT2}[model]
    recipe = "demo" if model == "speedrun" else model
    return load_recipe(recipe, [*settings, *overrides])


def write_recipe(path: Path, spec: RunSpec) -> Path:
    """The spec as a recipe file."""
    path.write_text(dump_spec(spec))
    return path


def language(tokens: int, seed: int) -> np.ndarray:
    """Documents of 4 to 60 tokens that mostly continue as a fixed permutation says: (tokens,) uint16, from a BOS on."""
    successor = np.random.default_rng(0).permutation(BOS)
    rng = np.random.default_rng(seed)
    stream: list[int] = []
    while len(stream) < tokens:
        token = int(rng.integers(BOS))
        stream.append(BOS)
        for surprise in rng.random(rng.integers(3, 60)) < 0.1:
            stream.append(token)
            token = int(rng.integers(BOS)) if surprise else int(successor[token])
    return np.array(stream[:tokens], dtype=np.uint16)


def make_data(
    directory: Path,
    train_tokens: Sequence[int] = (20_000,),
    val_tokens: int = 600,
    *,
    first_token: int = 0,
    bos: int | None = None,
) -> Path:
    """Shards of the language in `directory`, which is made; its tokens numbered from `first_token` on, BOS by `bos`."""
    directory.mkdir(parents=True, exist_ok=True)
    shards = [(train_name(index), language(tokens, index)) for index, tokens in enumerate(train_tokens, start=1)]
    for name, tokens in (*shards, (val_name(), language(val_tokens, 1000))):
        numbered = tokens + np.uint16(first_token)
        write_tokens(directory / name, numbered if bos is None else np.where(tokens == BOS, bos, numbered))
    return directory


def averaged_spec(*overrides: str) -> RunSpec:
    """The tiny run of record 89 with GPT-2's vocabulary and the end that `record89-averaged` has in 30 steps."""
    end = load_recipe("record89-averaged", steps=30).model_dump(mode="json")["training"]["end"]
    vocabulary = ("model.vocab_size=50257", "model.padded_vocab_size=50304", "data={bos: 50256, epochs: null}")
    return tiny_spec(*vocabulary, f"training.end={json.dumps(end)}", *overrides, model="record89")


def make_text_data(directory: Path) -> Path:
    """Shards of the prose that ships with the package in GPT-2's tokens."""
    directory.mkdir(parents=True)
    stream: list[int] = []
    with gzip.open(embedded_corpus(), "rt") as lines:
        for line in itertools.islice(lines, 60):
            stream += [GPT2_BOS, *encode_text(json.loads(line)["text"][:300]).tolist()]
    tokens = np.array(stream, dtype=np.uint16)
    for name, part in ((train_name(1), tokens[:-600]), (val_name(), tokens[-600:])):
        write_tokens(directory / name, part)
    return directory


def train(spec: RunSpec, data: Path, path: Path | None = None, *, resume: bool = False) -> Result:
    """Run the spec in the directory `path`, which becomes a run's; None writes nothing."""
    run = None
    if path is not None:
        if not path.exists():
            RunDirectory.create(path.parent, spec).path.rename(path)
        run = RunDirectory.open(path)
    return train_run(spec, run=run, data_directory=data, resume=resume)


def python(
    *arguments: str, cwd: Path | None = None, timeout: float = 200, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments on one thread, this folder's modules at hand."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    # torch writes its own choice of this one into the environment of a process that has compiled something.
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment,
        check=False,
    )


def losses(path: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Training and validation losses of a run by step, as written: every digit that float32 has."""
    run: RunMetrics = read_run(path)
    return (
        {record["step"]: record["train_loss"] for record in run.steps},
        {record["step"]: record["val_loss"] for record in run.evaluations},
    )


def newest_state(path: Path) -> dict[str, Any]:
    """The newest checkpoint of the run at `path`, without its time and whose it is."""
    state = load_newest_checkpoint(RunDirectory.open(path).checkpoint_directory)
    assert state is not None
    del state["elapsed_ms"], state["run"]
    return state


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    """Equal bit for bit, tensors and all."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, where
        assert torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)), f"{where} differs"
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert one == other, f"{where}: {one} and {other}"
