"""Trains the bundled demo model from scratch, on one CPU core: `python -m tools.demo.train -o
DIR`.

The model exists to be looked at: it is the smallest Mixture-of-Experts model whose experts visibly
specialise, so that every command of moe-inspect has something true to show without a download or a
GPU. `--balance` makes its three variants, which differ in nothing but the balancing loss.

Legend of shapes: T tokens, K slots, E experts, L layers, D domains, V vocabulary, W windows, S
tokens a window.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moe_inspect.errors import MoeInspectError
from tools.demo import card, texts
from tools.demo.balancing import BALANCING_LOSSES

EXPERTS, TOP_K = 8, 2
VOCABULARY = 3072
WINDOW = 128
WINDOWS_PER_DOMAIN = (
    3  # a batch holds as many windows of each domain, so a domain's size gives it no more experts
)
OPENING_SHARE = (
    0.25  # windows that open a document with <s>: as everyone who traces the model will feed it
)
TRAIN_TOKENS_PER_DOMAIN = 500_000
TOKENIZER_CHARACTERS_PER_DOMAIN = 1_000_000
HELD_OUT_WINDOWS = 64
STEPS = 2000
LEARNING_RATE, WARMUP_STEPS, FINAL_LEARNING_RATE_SHARE = 3e-3, 60, 0.05
BALANCE_COEFFICIENT = 0.05


@dataclass(frozen=True)
class Stream:
    """The documents of a domain, concatenated, each as <s> … </s>. start: offset of each
    document."""

    token_T: np.ndarray
    start: np.ndarray

    def window(self, document: int, offset: int) -> np.ndarray:
        """WINDOW tokens from an offset in a document, moved back so as to run over its end only
        where it is shorter."""
        first, last = self.start[document], self.start[document + 1]
        begin = max(first, min(first + offset, last - WINDOW))
        begin = max(0, min(begin, len(self.token_T) - WINDOW))
        return self.token_T[begin : begin + WINDOW]

    def sample(self, random: np.random.Generator) -> np.ndarray:
        """A training window: a document in proportion to its length, then its opening or anywhere
        in it."""
        document = (
            int(np.searchsorted(self.start, random.integers(len(self.token_T)), side="right")) - 1
        )
        length = int(self.start[document + 1] - self.start[document])
        opening = random.random() < OPENING_SHARE
        return self.window(
            document, 0 if opening else int(random.integers(max(1, length - WINDOW + 1)))
        )

    def evenly(self, count: int) -> np.ndarray:
        """Held-out windows: spread evenly over the stream, the same for every run. int64 [W, S]."""
        position = np.linspace(0, len(self.token_T) - 1, count).astype(int)
        document = np.searchsorted(self.start, position, side="right") - 1
        return np.stack(
            [self.window(d, p - self.start[d]) for d, p in zip(document, position, strict=True)]
        )


def train_tokenizer(documents: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the same number of characters per domain, so that no domain is
    split into single bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    pieces = []
    for domain in documents:
        left = TOKENIZER_CHARACTERS_PER_DOMAIN
        for text in documents[domain]:
            pieces.append(text[:left])
            left -= len(pieces[-1])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        pieces,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<s>",  # not </s>: collators leave padding out of the loss, ends are learned
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, limit: float = math.inf
) -> Stream:
    """Whole documents in their order until `limit` tokens are reached."""
    streams, total = [], 0
    for text in documents:
        streams.append([*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id])
        total += len(streams[-1])
        if total >= limit:
            break
    if total < WINDOW:
        raise MoeInspectError(
            f"{total} tokens in {len(documents)} documents: each domain needs {WINDOW}: add text"
        )
    start = np.cumsum([0, *map(len, streams)])
    return Stream(np.concatenate([np.array(ids, dtype=np.int64) for ids in streams]), start)


def new_model(vocabulary: int, seed: int) -> MixtralForCausalLM:
    """A Mixtral with random weights: its experts run on every experts implementation of
    transformers."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=1,
        router_aux_loss_coef=BALANCE_COEFFICIENT,
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def token_losses(logits_WSV: torch.Tensor, token_WS: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each token but the first of each window. float [W · (S − 1)]."""
    return F.cross_entropy(
        logits_WSV[:, :-1].flatten(0, 1).float(), token_WS[:, 1:].flatten(), reduction="none"
    )


def loads(logits_TE: torch.Tensor) -> np.ndarray:
    """Assignments per expert: how often it is among the top k of the router logits. int64 [E]."""
    return torch.bincount(
        logits_TE.topk(TOP_K, dim=-1).indices.flatten(), minlength=EXPERTS
    ).numpy()


def train(
    model: MixtralForCausalLM, streams: dict[str, Stream], balance: str, steps: int, seed: int
) -> None:
    """AdamW with warm-up and a cosine that ends at `steps`: the number of steps, not the clock,
    decides the result."""
    random = np.random.default_rng(seed)
    balancing_loss = BALANCING_LOSSES[balance]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    model.train()
    started_s = time.perf_counter()
    for step in range(1, steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        share = min(1.0, step / WARMUP_STEPS) * max(FINAL_LEARNING_RATE_SHARE, cosine)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * share
        windows = [
            stream.sample(random) for stream in streams.values() for _ in range(WINDOWS_PER_DOMAIN)
        ]
        token_WS = torch.from_numpy(np.stack(windows))
        output = model(input_ids=token_WS, output_router_logits=True, use_cache=False)
        language_loss = token_losses(output.logits, token_WS).mean()
        loss = language_loss
        if balancing_loss is not None:
            loss = loss + BALANCE_COEFFICIENT * balancing_loss(output.router_logits, EXPERTS, TOP_K)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            elapsed_s = time.perf_counter() - started_s
            worst = max(load_E.max() / load_E.mean() for load_E in map(loads, output.router_logits))
            progress = (
                f"step {step}/{steps}  loss {language_loss.item():.3f}  worst layer's max / mean "
                f"load {worst:.2f}"
            )
            print(f"{progress}  {elapsed_s:.0f} s", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Evaluation:
    """Held-out evaluation. loss_nats: by domain. load_LDE: assignments by layer, domain and expert,
    int64."""

    loss_nats: dict[str, float]
    load_LDE: np.ndarray

    def balance(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A layer's max ÷ mean and min ÷ mean load, and the mutual information of domain and expert
        in bits. [L] each."""
        load_LE = self.load_LDE.sum(1)
        mean_L = load_LE.mean(1)
        joint_LDE = self.load_LDE / self.load_LDE.sum((1, 2), keepdims=True)
        expected_LDE = joint_LDE.sum(2, keepdims=True) * joint_LDE.sum(1, keepdims=True)
        ratio_LDE = np.divide(
            joint_LDE, expected_LDE, out=np.ones_like(joint_LDE), where=joint_LDE > 0
        )
        return (
            load_LE.max(1) / mean_L,
            load_LE.min(1) / mean_L,
            (joint_LDE * np.log2(ratio_LDE)).sum((1, 2)),
        )


@torch.no_grad()
def evaluate(model: MixtralForCausalLM, streams: dict[str, Stream]) -> Evaluation:
    """The same number of held-out windows per domain, so that a balanced layer has uniform load on
    them."""
    model.eval()
    loss_nats, load_DLE = {}, []
    for domain, stream in streams.items():
        token_WS = torch.from_numpy(stream.evenly(HELD_OUT_WINDOWS))
        output = model(input_ids=token_WS, output_router_logits=True, use_cache=False)
        loss_nats[domain] = token_losses(output.logits, token_WS).mean().item()
        load_DLE.append([loads(logits_TE) for logits_TE in output.router_logits])
    return Evaluation(loss_nats, np.array(load_DLE).transpose(1, 0, 2))


def unigram_losses(
    train_streams: dict[str, Stream], held_out: dict[str, Stream], vocabulary: int
) -> dict[str, float]:
    """The loss of predicting each domain's token frequencies: nats per token on the same held-out
    windows."""
    losses = {}
    for domain, stream in train_streams.items():
        # +1: no token is impossible
        count_V = np.bincount(stream.token_T, minlength=vocabulary) + 1.0
        surprise_V = -np.log(count_V / count_V.sum())
        losses[domain] = float(surprise_V[held_out[domain].evenly(HELD_OUT_WINDOWS)[:, 1:]].mean())
    return losses


def parameter_counts(model: MixtralForCausalLM) -> tuple[int, int]:
    """Total, and active per token: without the E − k experts of each layer that a token is not
    routed to."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name
    )
    return total, total - experts * (EXPERTS - TOP_K) // EXPERTS


def build(output: Path, balance: str, steps: int, own_texts: Path | None, seed: int) -> Evaluation:
    """The whole recipe: texts, tokenizer, training, the model folder and its card. Returns the bf16
    model's figures."""
    # with one thread the sums have one order, so that a seed gives one result
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    data = (
        texts.load_folder(own_texts, seed)
        if own_texts
        else texts.load_packages(seed, texts.default_cache())
    )
    tokenizer = train_tokenizer(data.train)
    train_streams = {
        name: encode(found, tokenizer, TRAIN_TOKENS_PER_DOMAIN)
        for name, found in data.train.items()
    }
    held_out = {name: encode(found, tokenizer) for name, found in data.held_out.items()}
    model = new_model(len(tokenizer), seed)

    started_s = time.perf_counter()
    train(model, train_streams, balance, steps, seed)
    wall_s = time.perf_counter() - started_s
    float32 = evaluate(model, held_out)

    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    model.bfloat16().save_pretrained(output)
    shipped = MixtralForCausalLM.from_pretrained(output, local_files_only=True)
    shipped.set_experts_implementation("grouped_mm")
    evaluation = evaluate(shipped, held_out)
    unigram_nats = unigram_losses(train_streams, held_out, len(tokenizer))

    config = model.config
    total, active = parameter_counts(model)
    train_tokens = {domain: len(stream.token_T) for domain, stream in train_streams.items()}
    losses = card.losses(evaluation.loss_nats, unigram_nats)
    figures = f"{losses}\n\n{card.balance(*evaluation.balance())}"
    options = f" --balance {balance} --steps {steps} --seed {seed}" + (
        " --texts DIR" if own_texts else ""
    )
    coefficient = f"coefficient {BALANCE_COEFFICIENT}"
    (output / "README.md").write_text(
        card.CARD.format(
            balance=balance,
            balancing="none" if BALANCING_LOSSES[balance] is None else f"{balance}, {coefficient}",
            total=total,
            active=active,
            layers=config.num_hidden_layers,
            experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            positions=config.max_position_embeddings,
            vocabulary=config.vocab_size,
            domains=len(data.train),
            train_tokens=sum(train_tokens.values()),
            train_documents=sum(len(stream.start) - 1 for stream in train_streams.values()),
            held_out_documents=sum(map(len, data.held_out.values())),
            sources=card.sources(data, train_tokens),
            windows=HELD_OUT_WINDOWS,
            window=WINDOW,
            loss_bf16=np.mean(list(evaluation.loss_nats.values())),
            loss_float32=np.mean(list(float32.loss_nats.values())),
            figures=figures,
            command=f"python -m tools.demo.train -o DIR{options}",
            steps=steps,
            batch=WINDOWS_PER_DOMAIN * len(data.train),
            seed=seed,
            wall_s=wall_s,
            cpu=card.cpu_name(),
            versions=card.versions(),
        ),
        encoding="utf-8",
    )
    print(figures)
    return evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo.train", description="Train the demo model."
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo-model"),
        help="folder of the model (%(default)s)",
    )
    parser.add_argument(
        "--balance", choices=list(BALANCING_LOSSES), default="per-layer", help="(%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="(%(default)s)")
    parser.add_argument(
        "--texts", type=Path, help="own texts: DIR/<domain>/*.txt, instead of the Debian packages"
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args(arguments)
    try:
        build(options.output, options.balance, options.steps, options.texts, options.seed)
    except MoeInspectError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
