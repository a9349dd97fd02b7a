"""The seam to SGLang: where its schedulers choose experts, run a batch and end requests. `register`
is an entry point, which SGLang calls.

Read from SGLang 0.5.23. L routers, T rows, K slots, E experts.
"""

# pyright: reportMissingImports=false
# (SGLang is not installed where types are checked)

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from moe_inspect.capture.engine.settings import (
    KEY,
    REFUSED,
    Settings,
    is_asked,
    tell_unknown,
    tell_why,
)
from moe_inspect.capture.engine.step import Schedule, edges_of
from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_inspect.capture.engine.steps import Scheduled

log = logging.getLogger("sglang.moe_inspect")
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")  # in a config
# algorithms whose drafts `eagle_sample` accepts or rejects
JUDGED = ("NGRAM", "STANDALONE", "EAGLE", "EAGLE3")


def register() -> None:
    """SGLang calls it in each of its processes."""
    tell_unknown(log)
    if not is_asked():
        return
    root = "sglang.srt"
    state = f"{root}.managers.scheduler_components.internal_state"
    around = {  # which say why nothing is recorded, too
        f"{state}.SchedulerInternalStateController.get_internal_state": _get_state,
        f"{state}.SchedulerInternalStateController.set_internal_state": _set_state,
    }
    try:
        settings = Settings.read()
        if settings.replay is not None:
            log.warning("moe-inspect: MOE_INSPECT_REPLAY is for vLLM: nothing is replayed")
        if not settings.is_active:
            return
        around |= {
            f"{root}.model_executor.model_runner.ModelRunner.load_model": _load_model,
            f"{root}.model_executor.model_runner.ModelRunner.forward": _forward,
            f"{root}.layers.moe.topk._post_process_topk_ids": _choose,
            f"{root}.speculative.eagle_utils.eagle_sample": _judge,
            f"{root}.managers.scheduler.Scheduler.run_batch": _run_batch,
            f"{root}.managers.scheduler.Scheduler.process_batch_result": _process_result,
        }
    except MoeInspectError as error:  # the engine goes on
        Here.refused = tell_why(log, error)
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        for target, hook in around.items():
            HookRegistry.register(target, hook, HookType.AROUND)
    except Exception as error:
        tell_why(log, error)


class Here:
    """Of this process, which runs one scheduler: the seam, or why there is none. `said`: what the
    last command was answered, which the state shows once."""

    seam: Seam | None = None
    refused = ""
    said: dict[str, Any] | None = None


def _load_model(load: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    loaded = load(runner, *args, **kwargs)
    if runner.is_draft_worker:
        return loaded
    try:
        from sglang.srt.runtime_context import get_parallel

        if get_parallel().tp_rank == 0:  # the others of its group see the same tokens
            Here.seam = Seam(runner, Settings.read())
    except Exception as error:  # the engine goes on
        Here.refused = tell_why(log, error)
    return loaded


def _choose(
    post_process: Callable[..., Any],
    topk_ids: Tensor,
    topk_weights: Tensor,
    topk_config: Any,
    router_logits: Tensor,
    layer_id: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Before padding and shared experts are marked. Where experts have replicas, they become
    physical experts there, others than the logical ones that are given."""
    seam = Here.seam
    if seam is not None and not getattr(topk_config, "allow_routed_experts_capture", True):
        seam = None
    if seam is not None and not seam.replicates:
        seam.keep(layer_id, topk_ids, topk_weights, router_logits)
    given = topk_ids, topk_weights, topk_config, router_logits, layer_id
    made = post_process(*given, *args, **kwargs)
    if seam is not None and seam.replicates:
        try:
            physicals, _, without_shared = made
        except ValueError as error:  # as of another version
            seam.recorder.stop(error)
            return made
        physicals = physicals if without_shared is None else without_shared
        seam.keep(layer_id, topk_ids, topk_weights, router_logits, physicals)
    return made


def _run_batch(run: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kw: Any) -> Any:
    if Here.seam is not None:
        Here.seam.note_prompts(batch.reqs)
    return run(scheduler, batch, *args, **kw)


def _forward(forward: Callable[..., Any], runner: Any, batch: Any, *args: Any, **kw: Any) -> Any:
    seam = None if runner.is_draft_worker else Here.seam
    if seam is not None:
        seam.before_step()
    output = forward(runner, batch, *args, **kw)
    if seam is not None:
        seam.after_step(batch)
    return output


def _judge(judge: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Which drafts are accepted."""
    output = judge(*args, **kwargs)
    if Here.seam is not None:
        Here.seam.after_sampling(output)
    return output


def _process_result(
    process: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kw: Any
) -> Any:
    output = process(scheduler, batch, *args, **kw)
    if Here.seam is not None:
        Here.seam.note_ended(batch.reqs)
    return output


def _get_state(get: Callable[..., Any], controller: Any, request: Any) -> Any:
    answer = get(controller, request)
    said, Here.said = Here.said, None
    answer.internal_state[KEY] = said or _command("status")
    return answer


def _set_state(set_state: Callable[..., Any], controller: Any, request: Any) -> Any:
    asked = dict(request.server_args)
    ours = {key: asked.pop(key) for key in list(asked) if key.startswith(f"{KEY}.")}
    if not ours or asked:  # SGLang refuses a key of ours
        return set_state(controller, request)
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    for key, number in ours.items():
        what = key.partition(".")[2]
        value = str(number) if what == "sample" else "on" if number else "off"
        Here.said = _command(what, value)
    return SetInternalStateReqOutput(updated="refused" not in (Here.said or {}))


def _command(what: str, value: str = "") -> dict[str, Any]:
    if Here.seam is None:
        return {"refused": Here.refused or f"{REFUSED}: another process does"}
    return Here.seam.recorder.command(what, value)


class Seam:
    """Of one scheduler, whose model is loaded."""

    def __init__(self, runner: Any, settings: Settings):
        import torch
        from sglang.srt.runtime_context import get_exec

        from moe_inspect.capture.engine.rows import EngineRows
        from moe_inspect.capture.engine.sender import recorder_of
        from moe_inspect.capture.rows import PHYSICALS

        server, config = runner.server_args, runner.model_config
        routers = recordable_routers(runner.model, server)
        self.layers = {layer: n for n, layer in enumerate(routers)}
        self.unseen = set(self.layers)  # layers that have not chosen experts yet
        (K,) = set(routers.values())
        E = next((e for name in EXPERTS if (e := getattr(config.hf_text_config, name, None))), None)
        if E is None:
            raise MoeInspectError("its config does not state a number of experts")
        chunk = server.chunked_prefill_size or -1
        prefill = chunk if chunk > 0 else max(server.max_prefill_tokens, config.context_len)
        verified = server.speculative_num_draft_tokens or 1  # tokens of each request
        T = prefill + max((server.max_running_requests or 0) * verified, 4096)
        shape, device = (len(routers), T, K), torch.device(runner.device)
        self.replicates = get_exec().moe.ep_dispatch_algorithm is not None
        extras = ["logits"] * settings.records_logits + [PHYSICALS] * self.replicates
        rows = EngineRows(shape, E, device, extras, server.enable_torch_compile)
        about = _about(server, config) | {
            "layers": list(routers),
            "paths": [f"layers.{layer}" for layer in routers],
        }

        self.recorder = recorder_of(rows, settings, about, replicas=lambda: self.replicas)
        self.replicas: Tensor | None = None  # of the forward pass, which may end with others
        self.places = torch.tensor(list(routers), device=device)
        # of each request that is not over, the end of its prompt, and of its answer at the latest
        self.prompts: dict[str, tuple[int, int]] = {}
        self.ended: set[str] = set()

    def before_step(self) -> None:
        if not self.replicates:
            return
        try:
            from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

            found = get_global_expert_location_metadata()
            self.replicas = found.physical_to_logical_map[self.places]
        except Exception as error:
            self.recorder.stop(error)

    def keep(self, layer: int, *choice: Tensor) -> None:
        """In the forward pass: keep a router's choice, as `EngineRows.keep` takes it."""
        if (n := self.layers.get(layer)) is not None:
            self.unseen.discard(layer)
            self.recorder.keep(n, *choice)

    def note_prompts(self, requests: list[Any]) -> None:
        try:
            for request in requests:
                prompt, most = len(request.origin_input_ids), request.sampling_params.max_new_tokens
                self.prompts[request.rid] = prompt, prompt + most - 1
        except Exception as error:
            self.recorder.stop(error)

    def note_ended(self, requests: list[Any]) -> None:
        try:
            for request in requests:
                if request.finished():
                    self.ended.add(request.rid)
                    self.prompts.pop(request.rid, None)
        except Exception as error:
            self.recorder.stop(error)

    def after_step(self, batch: Any) -> None:
        try:
            n = 0 if batch.forward_mode.is_idle() else len(batch.input_ids)
            if n and self.unseen:
                layers = ", ".join(map(str, sorted(self.unseen)))
                raise MoeInspectError(f"layers {layers} choose experts where nobody sees it")
            ended, self.ended = self.ended, set()
        except Exception as error:
            self.recorder.stop(error)
            return
        self.recorder.after_step(n, ended, lambda: self._schedule(batch))

    def _schedule(self, batch: Any) -> Scheduled:
        requests, mode = list(batch.rids), batch.forward_mode
        R = len(requests)
        drafts: Sequence[int] = ()
        rows: Iterable[int] = [1] * R
        if mode.is_target_verify():  # the last token, and a tree of drafts behind it
            rows = [len(batch.input_ids) // R] * R
            drafts = [n - 1 for n in rows]
        elif mode.is_extend():
            rows = map(int, batch.extend_seq_lens_cpu)
        # a request that has ended meanwhile was decoding
        known = [self.prompts.get(request, (0, 2**31)) for request in requests]
        prompts, ends = [prompt for prompt, _ in known], [end for _, end in known]
        schedule = Schedule(requests, edges_of(rows), prompts, drafts, ends)
        return schedule, batch.input_ids, batch.positions

    def after_sampling(self, judged: Any) -> None:
        """The third that is returned: of each request the rows of the step that are the answer's,
        the first of them its last token, and −1. [R, depth]"""
        try:
            accepted = judged[2]
            if accepted.numel():  # a step of no request has none
                rows = (accepted - accepted[:, :1]).where(accepted >= 0, -1)
                self.recorder.after_sampling(rows)
        except Exception as error:
            self.recorder.stop(error)


def recordable_routers(model: Any, server: Any) -> dict[int, int]:
    """Layer → K of each router, by layer. MoeInspectError where a router does not see each token of
    this scheduler once, or what it chooses is not told."""
    found = [m for m in model.modules() if type(m).__name__ == "TopK" and not m.is_draft]
    if not found:
        raise MoeInspectError(f"{type(model).__name__} has no MoE layer with SGLang's TopK")
    speculates = server.speculative_algorithm
    unseen = {
        f"speculation by {speculates}": speculates not in (None, *JUDGED),
        "pipeline parallelism": server.pp_size > 1,
        "attention by data parallelism": server.enable_dp_attention,
        "two-batch overlap": server.enable_two_batch_overlap,
    }
    if there := [name for name, is_there in unseen.items() if is_there]:
        raise MoeInspectError(f"{', '.join(there)}: a router does not see each token once")
    routers = {
        topk.layer_id: topk.topk_config.top_k - topk.topk_config.num_shared_topk_slots
        for topk in sorted(found, key=lambda topk: topk.layer_id)
    }
    if len(routers) < len(found) or len(set(routers.values())) > 1:
        raise MoeInspectError("its layers have several routers, or routers of several sizes")
    return routers


def _about(server: Any, config: Any) -> dict[str, Any]:
    from sglang.srt.runtime_context import get_parallel

    return {
        "engine": "sglang",
        "model": server.model_path,
        "revision": server.revision,
        "tokenizer": server.tokenizer_path or server.model_path,
        "trust_remote_code": server.trust_remote_code,
        "vocabulary": config.vocab_size,
        "dtype": str(config.dtype).removeprefix("torch."),
        "rank": get_parallel().dp_rank or 0,
    }
