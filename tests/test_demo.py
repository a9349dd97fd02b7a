"""The demo: what is bundled is what it says, and the recipe that made it runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_inspect.demo import CORPUS_DIR, MODEL_DIR
from moe_inspect.errors import MoeInspectError
from tools.demo import balancing, texts, train

torch.set_num_threads(1)

DOMAINS = sorted(path.name for path in CORPUS_DIR.iterdir())
TEXTS = {path: path.read_text(encoding="utf-8") for path in sorted(CORPUS_DIR.glob("*/*.txt"))}


def texts_of(domain: str) -> list[str]:
    return [text for path, text in TEXTS.items() if path.parent.name == domain]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture
def own_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three domains of three documents, long enough for the split; few windows, to be quick."""
    monkeypatch.setattr(train, "HELD_OUT_WINDOWS", 4)
    for domain in DOMAINS[:3]:
        found = texts_of(domain)
        (folder := tmp_path / "texts" / domain).mkdir(parents=True)
        for n in range(3):
            (folder / f"{n}.txt").write_text("\n".join(found[n:] + found[:n]), encoding="utf-8")
    return tmp_path / "texts"


def test_corpus_has_the_domains_the_model_was_trained_on():
    assert sorted(texts.DOMAINS) == DOMAINS
    assert len(DOMAINS) >= 6
    assert all(len(texts_of(domain)) >= 8 for domain in DOMAINS)


def test_corpus_documents_differ_and_have_60_to_200_tokens_that_round_trip(tokenizer):
    assert len(set(TEXTS.values())) == len(TEXTS)
    for path, text in TEXTS.items():
        token_ids = tokenizer(text)["input_ids"]
        assert 60 <= len(token_ids) <= 200, path
        assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_model_is_small_and_bfloat16_with_8_experts_and_top_2(tokenizer):
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 6_000_000
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert (config["dtype"], config["num_local_experts"]) == ("bfloat16", 8)
    assert config["num_experts_per_tok"] == 2
    assert config["num_hidden_layers"] >= 4
    assert config["vocab_size"] == len(tokenizer)
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_tokenizer_puts_bos_in_front_and_its_padding_is_never_a_target(tokenizer):
    batch = tokenizer(["a b c", "a"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert batch["input_ids"][1, 0] == tokenizer.bos_token_id
    assert tokenizer("a", add_special_tokens=False)["input_ids"][0] != tokenizer.bos_token_id


def test_model_card_states_source_licence_and_figures():
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    for source in texts.SOURCES:
        assert source.package in card
        assert source.licence in card
    assert all(f"| {domain} |" in card for domain in DOMAINS)
    assert "not a useful language model" in card


@torch.no_grad()
def run_on_corpus(model, tokenizer) -> tuple[dict[str, float], np.ndarray]:
    """Nats a token of each domain of the bundled corpus, and assignments, int64 [L, D, E]."""
    losses, L = {}, model.config.num_hidden_layers
    load_LDE = np.zeros((L, len(DOMAINS), train.EXPERTS), dtype=np.int64)
    for d, domain in enumerate(DOMAINS):
        nats = []
        for text in texts_of(domain):
            token_WS = tokenizer(text, return_tensors="pt")["input_ids"]
            output = model(input_ids=token_WS, output_router_logits=True)
            nats.append(train.token_losses(output.logits, token_WS))
            load_LDE[:, d] += np.stack([train.loads(logits) for logits in output.router_logits])
        losses[domain] = torch.cat(nats).mean().item()
    return losses, load_LDE


def test_model_has_learned_every_domain_is_balanced_and_specialises(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True).eval()
    learned, load_LDE = run_on_corpus(model, tokenizer)
    random, _ = run_on_corpus(train.new_model(len(tokenizer), seed=1).eval(), tokenizer)
    for domain in DOMAINS:
        assert learned[domain] < math.log(len(tokenizer)) - 2, learned
        assert learned[domain] < random[domain] - 2, (learned, random)
        assert abs(random[domain] - math.log(len(tokenizer))) < 0.5, random
    max_over_mean_L, min_over_mean_L, mi_bits_L = train.Evaluation({}, load_LDE).balance()
    assert max_over_mean_L.max() < 1.6
    assert min_over_mean_L.min() > 0.3
    assert mi_bits_L.min() > 0.1
    assert mi_bits_L.max() > 0.3


def test_balance_of_a_hand_computed_load():
    """One layer keeps two domains apart, in the other an expert takes all."""
    load_LDE = np.array([[[4, 0], [0, 4]], [[4, 0], [4, 0]]])
    max_over_mean_L, min_over_mean_L, mi_bits_L = train.Evaluation({}, load_LDE).balance()
    np.testing.assert_allclose(max_over_mean_L, [1, 2])
    np.testing.assert_allclose(min_over_mean_L, [1, 0])
    np.testing.assert_allclose(mi_bits_L, [1, 0], atol=1e-12)


def test_balancing_losses_and_that_pooled_is_blind_to_layers_that_collapse_apart():
    """Uniform routers; two layers on one half of the experts each; both on the same half."""
    even, left, right = torch.zeros(16, 4), torch.zeros(16, 4), torch.zeros(16, 4)
    left[:, :2], right[:, 2:] = 30, 30
    for logits, per_layer, pooled in (
        ([even], 1, 2),
        ([even] * 4, 1, 2),
        ([left, right], 2, 2),
        ([left, left], 2, 4),
    ):
        assert balancing.per_layer_balancing_loss(logits, 4, 2).item() == pytest.approx(per_layer)
        assert balancing.pooled_balancing_loss(logits, 4, 2).item() == pytest.approx(pooled)


def test_windows_do_not_cross_a_document_that_is_long_enough_and_short_ones_are_packed():
    length = train.WINDOW * 2
    stream = train.Stream(np.repeat(np.arange(5), length), np.arange(6) * length)
    random = np.random.default_rng(0)
    for _ in range(200):
        assert len(set(stream.sample(random))) == 1
    windows_WS = stream.evenly(40)
    assert windows_WS.shape == (40, train.WINDOW)
    assert (windows_WS == windows_WS[:, :1]).all()
    assert set(windows_WS[:, 0]) == set(range(5))
    short = train.Stream(np.repeat(np.arange(20), 10), np.arange(21) * 10)
    assert short.window(0, 0).shape == short.window(19, 5).shape == (train.WINDOW,)


def test_split_is_by_document_and_by_seed():
    documents = [f"document {n} " * 20 for n in range(50)]
    kept, held_out = texts.split(documents, "english", seed=0)
    assert sorted(kept + held_out) == sorted(documents)
    assert held_out == texts.split(documents, "english", seed=0)[1]
    assert held_out != texts.split(documents, "english", seed=1)[1]
    assert 1 <= len(held_out) <= 5


def test_prose_keeps_its_own_language_once():
    german = "<div>Der Rechner wird im nächsten Schritt neu gestartet, und das System ist nicht "
    german += "mehr erreichbar.</div>"
    english = "<p>The computer is restarted in the next step, and the system can not be reached "
    english += "for as long.</p>"
    body = f"{german}{english}{german}<pre>{english}</pre>"
    page = f"<html><head><title>x</title></head><body>{body}</body></html>"
    (found,) = texts.prose(page, "german", set())
    assert found.startswith("Der Rechner")
    assert "The computer" not in found
    assert found.count("Rechner") == 1


@pytest.mark.parametrize("balance", list(train.BALANCING_LOSSES))
def test_recipe_runs_end_to_end(balance, own_texts, tmp_path, capsys):
    output = tmp_path / "model"
    given = ["-o", str(output), "--balance", balance, "--steps", "3", "--texts", str(own_texts)]
    assert train.main(given) == 0
    assert "MI(domain; expert)" in capsys.readouterr().out
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"--balance {balance} --steps 3 --seed 0 --texts DIR" in card
    tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(output, local_files_only=True)
    assert model.dtype == torch.bfloat16
    fed = tokenizer("a", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**fed, max_new_tokens=2).shape[0] == 1


def test_recipe_is_deterministic_and_the_seed_matters(own_texts, tmp_path):
    def weights(name: str, *options: str) -> bytes:
        given = ["--steps", "2", "--texts", str(own_texts), *options]
        train.main(["-o", str(tmp_path / name), *given])
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert weights("a") == weights("b")
    assert weights("a") != weights("c", "--seed", "1")


def test_missing_texts_are_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train.main(["-o", str(tmp_path / "model"), "--texts", str(tmp_path / "empty")]) == 1
    assert str(tmp_path / "empty") in capsys.readouterr().err
    (tmp_path / "texts" / "english").mkdir(parents=True)
    (tmp_path / "texts" / "english" / "1.txt").write_text("one")
    with pytest.raises(MoeInspectError, match="english has 1 document"):
        texts.load_folder(tmp_path / "texts", seed=0)
