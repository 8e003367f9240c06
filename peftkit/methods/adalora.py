"""AdaLoRA: singular triplets beside frozen projections, pruned in training to a budget that all sites share."""

from __future__ import annotations

import dataclasses
import re
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import functional
from peftkit.errors import TrainingError
from peftkit.sharding import gathered, laid_out_as
from peftkit.spec import Adapter, Attach, Config, Knob, Method, Paper, PeftFormat, Site, State, config
from peftkit.stepping import Stepped

TENSORS = ("lora_A", "lora_E", "lora_B")
HOW_TO_SET_STEPS = (
    "set total_step in the config, call peftkit.training.set_total_steps(model, steps), or add "
    "peftkit.training.callback(model) to the Trainer's callbacks"
)


@config
class AdaLoRA(Config):
    """Size, schedule and importance score of the triplets."""

    init_r: int = 12
    """Triplets at each site at the start, at least 1."""
    target_r: int = 8
    """Triplets that are left at the end, on average over the sites; from 1 to init_r."""
    tinit: int = 0
    """Optimizer steps before the budget begins to shrink."""
    tfinal: int = 0
    """Optimizer steps at the end in which the budget stays as it is."""
    deltaT: int = 1
    """Optimizer steps from one pruning to the next, at least 1."""
    beta1: float = 0.85
    """Smoothing of the sensitivity, in (0, 1)."""
    beta2: float = 0.85
    """Smoothing of its uncertainty, in (0, 1)."""
    orth_reg_weight: float = 0.5
    """Weight of the penalty that keeps P and Q orthogonal, at least 0."""
    total_step: int | None = None
    """Optimizer steps of the whole training; None: filled in by the training loop before the first step."""
    lora_alpha: float = 8
    """The update is scaled by lora_alpha / init_r, above 0."""
    lora_dropout: float = 0.0
    """Probability of dropping an input element of the update in training, in [0, 1)."""
    init_lora_weights: bool = True
    """True: the update starts at zero; False: the singular values start at random."""
    rank_pattern: Mapping[str, tuple[bool, ...]] | None = None
    """Site path -> for each of the init_r triplets whether it is left; the budget is final."""

    def __post_init__(self) -> None:
        if isinstance(self.rank_pattern, Mapping):
            kept = {
                re.sub(r"\.lora_E(\.[^.]+)?$", "", key): tuple(rows) if isinstance(rows, list) else rows
                for key, rows in self.rank_pattern.items()
            }
            object.__setattr__(self, "rank_pattern", kept or None)
        super().__post_init__()

    def validate(self) -> None:
        """Raises ConfigError when a field is out of its range or the schedule has no room."""
        self.require(self.init_r >= 1, f"init_r must be at least 1, found {self.init_r}")
        self.require(
            1 <= self.target_r <= self.init_r,
            f"target_r must lie between 1 and init_r={self.init_r}, found {self.target_r}",
        )
        for name in ("tinit", "tfinal"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, found {getattr(self, name)}")
        self.require(self.deltaT >= 1, f"deltaT must be at least 1, found {self.deltaT}")
        for name in ("beta1", "beta2"):
            self.require(0 < getattr(self, name) < 1, f"{name} must lie in (0, 1), found {getattr(self, name)}")
        self.require(self.orth_reg_weight >= 0, f"orth_reg_weight must not be negative, found {self.orth_reg_weight}")
        self.require(self.lora_alpha > 0, f"lora_alpha must be above 0, found {self.lora_alpha}")
        self.require(0 <= self.lora_dropout < 1, f"lora_dropout must lie in [0, 1), found {self.lora_dropout}")
        if self.total_step is not None:
            self.require(
                self.tinit < self.total_step - self.tfinal,
                f"total_step={self.total_step} leaves no step between tinit={self.tinit} and the last "
                f"tfinal={self.tfinal} in which the budget can shrink",
            )
        for path, rows in (self.rank_pattern or {}).items():
            self.require(
                len(rows) == self.init_r,
                f"rank_pattern gives {len(rows)} triplets for {path}, expected init_r={self.init_r}",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, tuples as lists, keys sorted."""
        found = super().to_dict()
        if self.rank_pattern is not None:
            found["rank_pattern"] = {path: list(rows) for path, rows in sorted(self.rank_pattern.items())}
        return found


def budget_at(step: int, start: int, target: int, cfg: AdaLoRA, total_step: int) -> int:
    """Triplets that all sites may keep after an optimizer step, counted from 1.

        b(t) = b₀                                                        t ≤ t_i
               b_T + (b₀ - b_T) (1 - (t - t_i) / (T - t_i - t_f))³       t_i < t < T - t_f
               b_T                                                       t ≥ T - t_f

    rounded down. Section 3.3 of the paper, without the t_f that its printed formula also subtracts in the numerator:
    with it the budget would begin above b₀. The authors' code does the same.

    Args:
        start: b₀, triplets of all sites at the start.
        target: b_T.
    """
    if step <= cfg.tinit:
        return start
    if step >= total_step - cfg.tfinal:
        return target
    left = 1 - (step - cfg.tinit) / (total_step - cfg.tfinal - cfg.tinit)
    return int(target + (start - target) * left**3)


def orthogonality(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """‖V Vᵀ - I‖_F for the rows of V, and its gradient 2 (V Vᵀ - I) V / ‖V Vᵀ - I‖_F, zero where the norm is zero.

    Args:
        vectors: (r, n), float32 or float64.
    """
    gap = vectors @ vectors.T
    gap.diagonal().sub_(1)
    norm = gap.norm()
    return norm, (2 / norm.clamp_min(torch.finfo(norm.dtype).tiny)) * (gap @ vectors)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class AdaLoraAdapter(Adapter):
    """h = W x + scale * P diag(E) Q x, with Q = A (r, in), E (r, 1), P = B (out, r)."""

    additive = True

    def __init__(self, site: Site, cfg: AdaLoRA) -> None:
        super().__init__()
        rank = _rank(site, cfg)
        # The constant is Hugging Face peft's, whose folders would differ by a millionth without it.
        self.scale = cfg.lora_alpha / (cfg.init_r + 1e-5)
        self.dropout = cfg.lora_dropout
        self.lora_A = nn.Parameter(torch.empty(rank, site.in_features))
        self.lora_E = nn.Parameter(torch.empty(rank, 1))
        self.lora_B = nn.Parameter(torch.empty(site.out_features, rank))
        self.scored = cfg.rank_pattern is None
        if self.scored:
            self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))
            for name in TENSORS:
                shape = self._parameters[name].shape  # type: ignore[union-attr]  # set above
                self.register_buffer(f"sensitivity_{name}", torch.zeros(shape))
                self.register_buffer(f"uncertainty_{name}", torch.zeros(shape))
        self._before_training: Tensor | None = None
        self._notice_gradients()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch
        self._notice_gradients()

    def _notice_gradients(self) -> None:
        """Remembers the singular values that the first gradient meets, to tell later whether they were trained."""
        reference = weakref.ref(self)

        def notice(parameter: Tensor) -> None:
            adapter = reference()
            if adapter is not None and adapter._before_training is None:
                adapter._before_training = parameter.detach().clone()

        # A copy of an adapter that is not active does not require a gradient yet.
        trains = self.lora_E.requires_grad
        self.lora_E.requires_grad_(True).register_post_accumulate_grad_hook(notice)
        self.lora_E.requires_grad_(trains)

    def kept_rows(self) -> Tensor:
        """Which triplets the last pruning kept, (r,)."""
        kept = self._buffers.get("kept")
        return torch.ones(self.lora_E.shape[0], dtype=torch.bool) if kept is None else kept

    @property
    def moved(self) -> bool:
        """Whether the singular values have changed since they first received a gradient."""
        start = self._before_training
        return start is not None and not torch.equal(gathered(start.to(self.lora_E)), gathered(self.lora_E.detach()))

    def tensors(self) -> dict[str, Tensor]:
        """The triplets; the running scores belong to training and are in `state_dict` only."""
        return {name: self._parameters[name] for name in TENSORS}  # type: ignore[misc]  # set in the constructor

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(E) Q, (r, in), and P, (out, r)."""
        own = self._parameters
        return own["lora_A"] * own["lora_E"], own["lora_B"]  # type: ignore[operator, return-value]  # set above

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., out)."""
        if not self.lora_E.shape[0]:
            return call(x)  # type: ignore[no-any-return]  # a projection gives a tensor
        down, up = self.factors()
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        return functional.add_low_rank(call(x), dropped, down, up, self.scale)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """diag(E) Q and scale * P, without the triplets whose singular value is zero."""
        left = (self.lora_E.detach() != 0)[:, 0]
        down, up = (_wide(f.detach()) for f in self.factors())
        return down[left], self.scale * up[:, left]

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W' = W + scale * P diag(E) Q."""
        down, up = (_wide(f.detach()) for f in self.factors())
        return {"weight": base["weight"] + (self.scale * (up @ down)).to(base["weight"].dtype)}

    def part(self, side: int, start: int, stop: int) -> Adapter | None:
        """Columns of Q, or rows of P."""
        if side:
            return self._with(lora_A=self.lora_A[:, start:stop])
        return self._with(lora_B=self.lora_B[start:stop])

    def score(self, cfg: AdaLoRA, names: Collection[str]) -> None:
        """Takes the gradients of these tensors into the running sensitivity and its uncertainty.

            I = |w ∂L/∂w|,   Ī ← β₁ Ī + (1 - β₁) I,   Ū ← β₂ Ū + (1 - β₂) |I - Ī|

        Equations 8 to 10 of the paper; w is the value after the step, as in the authors' code.
        """
        for name in names:
            value = self._parameters[name]
            assert value is not None
            assert value.grad is not None
            sensitivity: Tensor = self._buffers[f"sensitivity_{name}"]  # type: ignore[assignment]  # registered
            uncertainty: Tensor = self._buffers[f"uncertainty_{name}"]  # type: ignore[assignment]  # registered
            now = (gathered(value.detach()) * gathered(value.grad)).abs().to(sensitivity.dtype)
            sensitivity.mul_(cfg.beta1).add_(now, alpha=1 - cfg.beta1)
            uncertainty.mul_(cfg.beta2).add_((now - sensitivity).abs(), alpha=1 - cfg.beta2)

    def importance(self) -> Tensor:
        """S = s(E) + mean s(P) + mean s(Q) of each triplet with s = Ī Ū, (r,); equations 7 and 11 of the paper."""
        of_a, of_e, of_b = (
            self._buffers[f"sensitivity_{n}"] * self._buffers[f"uncertainty_{n}"]  # type: ignore[operator]  # registered
            for n in TENSORS
        )
        return of_e[:, 0] + of_a.mean(1) + of_b.mean(0)

    def prune(self) -> None:
        """Sets the singular values of the triplets that are not kept to zero."""
        value = self.lora_E.detach()
        value.copy_(laid_out_as(gathered(value).masked_fill(~self.kept_rows()[:, None], 0), value))


class Allocator(Stepped):
    """The budget that the sites of one adapter share, and the step that training has reached.

    After each optimizer step the importance of every triplet is updated; on schedule the most important ones of all
    sites keep their singular values, and the rest are set to zero. Until the budget is final they can come back.
    """

    advises: ClassVar[bool] = False

    def __init__(self, cfg: AdaLoRA) -> None:
        super().__init__()
        self.config = cfg
        # A tuple, so that the members stay children of their own modules only.
        self.members: tuple[AdaLoraAdapter, ...] = ()
        self.total_step = cfg.total_step
        self.steps = 0
        self.final = cfg.rank_pattern is not None
        self.allocated = self.final
        """Whether the budget was ever applied, by this object or in the training that it goes on with."""

    def tensors(self) -> dict[str, Tensor]:
        """None: what the allocator knows belongs to training and is in `state_dict` only."""
        return {}

    def get_extra_state(self) -> Tensor:
        """Step, total steps or -1, whether the budget was applied, whether it is final."""
        total = -1 if self.total_step is None else self.total_step
        return torch.tensor([self.steps, total, int(self.allocated), int(self.final)])

    def set_extra_state(self, state: Tensor) -> None:
        """Goes on where the state was taken."""
        steps, total, allocated, final = (int(v) for v in state)
        self.steps, self.final = steps, bool(final) or self.config.rank_pattern is not None
        self.allocated = self.allocated or bool(allocated)
        if self.config.total_step is None and total >= 0:
            self.total_step = total

    def stepped(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All triplets of all sites."""
        for index, member in enumerate(self.members):
            for name in TENSORS:
                yield f"{index}.{name}", member._parameters[name]  # type: ignore[misc]  # set in the constructor

    def training_begins(self, steps: int) -> None:
        """Takes the length of the training, unless the config names one or the budget is final.

        Raises:
            TrainingError: the schedule has no room in that many steps, or cannot end within them.
        """
        cfg, total = self.config, self.steps + steps
        if self.final:
            return
        if cfg.total_step is not None and cfg.total_step - cfg.tfinal > total:
            raise TrainingError(
                f"AdaLoRA: with total_step={cfg.total_step} and tfinal={cfg.tfinal} the budget is final after "
                f"{cfg.total_step - cfg.tfinal} optimizer steps, but training ends after {total}; "
                "leave total_step=None to have it filled in, or train longer"
            )
        if cfg.total_step is None and cfg.tinit >= total - cfg.tfinal:
            raise TrainingError(
                f"AdaLoRA: {total} optimizer steps leave none between tinit={cfg.tinit} and the last "
                f"tfinal={cfg.tfinal} in which the budget can shrink; train longer, or lower tinit and tfinal"
            )
        self.steps_left(steps)

    def steps_left(self, steps: int) -> None:
        """Takes what is left of the training, unless the config names its length or the budget is final."""
        if self.config.total_step is None and not self.final:
            self.total_step = self.steps + steps

    def before_step(self, names: Collection[str], scale: float) -> float | Tensor:
        """Adds the gradient of the penalty to P and Q.

            orth_reg_weight * mean over all P and Q of ‖PᵀP - I‖_F, ‖Q Qᵀ - I‖_F

        The paper (equation 4) squares the norms and sums; the authors' code and Hugging Face peft take the mean of the
        norms, so that the usual weights mean this. Added here and not to the loss, it is not seen by gradient clipping.
        """
        if self.total_step is None and not self.final:
            raise TrainingError(
                f"AdaLoRA prunes on a schedule and does not know how many optimizer steps training makes: "
                f"{HOW_TO_SET_STEPS}"
            )
        weight = self.config.orth_reg_weight / (2 * len(self.members))
        total: float | Tensor = 0.0
        if not weight:
            return total
        for member, name, parameter in self._named(names):
            if name == "lora_E" or not parameter.numel():
                continue
            value = _wide(gathered(parameter.detach()))
            norm, gradient = orthogonality(value if name == "lora_A" else value.T)
            grad = parameter.grad
            assert grad is not None
            whole = (gradient if name == "lora_A" else gradient.T).to(grad.dtype)
            grad.add_(laid_out_as(whole, grad), alpha=weight * scale)
            total = total + weight * norm.to(member.lora_E.device)
        return total

    def after_update(self, names: Collection[str]) -> None:
        """Updates the importance of these tensors; a final budget is enforced at once."""
        for index, member in enumerate(self.members):
            if self.final:
                if member.scored and f"{index}.lora_E" in names:
                    member.prune()
                continue
            member.score(self.config, [n for n in TENSORS if f"{index}.{n}" in names])

    def after_step(self) -> None:
        """Counts the step and, on schedule, prunes to the budget."""
        self.steps += 1
        if self.final:
            return
        assert self.total_step is not None
        cfg, step = self.config, self.steps
        ends = step >= self.total_step - cfg.tfinal
        if step > cfg.tinit and (ends or step % cfg.deltaT == 0):
            start = sum(member.lora_E.shape[0] for member in self.members)
            self.allocate(budget_at(step, start, cfg.target_r * len(self.members), cfg, self.total_step))
            self.final = ends

    def allocate(self, budget: int) -> None:
        """Keeps the `budget` most important triplets of all sites; equation 5 of the paper."""
        device = self.members[0].lora_E.device
        scores = torch.cat([member.importance().to(device) for member in self.members])
        kept = torch.zeros(len(scores), dtype=torch.bool, device=device)
        kept[scores.argsort(descending=True, stable=True)[:budget]] = True
        sizes = [member.lora_E.shape[0] for member in self.members]
        for member, own in zip(self.members, kept.split(sizes), strict=True):
            member.kept_rows().copy_(own)
            member.prune()
        self.allocated = True

    def _named(self, names: Collection[str]) -> Iterator[tuple[AdaLoraAdapter, str, nn.Parameter]]:
        for name in names:
            index, _, own = name.partition(".")
            member = self.members[int(index)]
            yield member, own, member._parameters[own]  # type: ignore[misc]  # set in the constructor

    def live(self) -> int:
        """Triplets that the last pruning kept."""
        return sum(int(m.kept_rows().sum()) for m in self.members)

    def training_ended(self) -> None:
        """Checks that training did what the method is for.

        Warns when the budget was applied and training stopped before it was final (early stopping).

        Raises:
            TrainingError: the budget was never applied.
        """
        if not self.trained_names():
            return
        if not self.allocated:
            raise TrainingError(
                f"AdaLoRA: training ended and the budget was never updated: {self.steps} optimizer steps were seen, "
                f"with tinit={self.config.tinit} and total_step={self.total_step}. "
                + (
                    "Train past tinit"
                    if self.steps
                    else "Train with a torch.optim optimizer that holds the adapter's own parameters"
                )
            )
        if not self.final:
            warnings.warn(
                f"AdaLoRA: training ended at step {self.steps} of total_step={self.total_step} with {self.live()} "
                f"triplets, before the budget reached {self.config.target_r * len(self.members)}; "
                "the adapter keeps its full size",
                stacklevel=2,
            )

    def check_trained(self) -> None:
        """Checks that the adapter was not trained behind the allocator's back.

        Raises:
            TrainingError: it was.
        """
        if not self.final and not self.steps and any(member.moved for member in self.members):
            raise TrainingError(
                "AdaLoRA: the weights were trained but no optimizer step was seen, so the budget was never updated and "
                "the adapter is a plain low-rank update. Train with a torch.optim optimizer that holds the adapter's "
                "own parameters"
            )


def _rank(site: Site, cfg: AdaLoRA) -> int:
    kept = (cfg.rank_pattern or {}).get(site.path)
    return cfg.init_r if kept is None else sum(kept)


def parameter_count(site: Site, cfg: AdaLoRA) -> int:
    """r (in + out + 1), as trained: r is init_r, or what rank_pattern leaves."""
    return _rank(site, cfg) * (site.in_features + site.out_features + 1)


def final_parameter_count(sites: Sequence[Site], cfg: AdaLoRA) -> int:
    """Parameters that are left at the end of the schedule: target_r (in + out + 1) at each site.

    Exact when all sites have the same in + out, else the count of an even allocation, since training decides which
    sites keep their triplets. With a rank_pattern it is exact.
    """
    if cfg.rank_pattern is not None:
        return sum(parameter_count(site, cfg) for site in sites)
    return sum(cfg.target_r * (site.in_features + site.out_features + 1) for site in sites)


def build(site: Site, cfg: AdaLoRA, shared: nn.Module | None) -> AdaLoraAdapter:
    """The adapter of one projection, known to the allocator."""
    made = AdaLoraAdapter(site, cfg)
    if isinstance(shared, Allocator):
        shared.members = (*shared.members, made)
    return made


def build_shared(sites: Sequence[Site], cfg: AdaLoRA) -> Allocator:
    """The allocator, without members yet."""
    return Allocator(cfg)


def shared_count(sites: Sequence[Site], cfg: AdaLoRA) -> int:
    """0: the allocator has no parameters."""
    return 0


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: AdaLoRA) -> None:
    """P and Q from N(0, 0.02²), E = 0 (or from N(0, 1) with init_lora_weights=False), no importance yet."""
    assert isinstance(adapter, AdaLoraAdapter)
    nn.init.normal_(adapter.lora_A, std=0.02)
    nn.init.normal_(adapter.lora_B, std=0.02)
    if cfg.init_lora_weights:
        adapter.lora_E.zero_()
    else:
        nn.init.normal_(adapter.lora_E)
    for name, buffer in adapter.named_buffers():
        buffer.fill_(name == "kept")


def stored(cfg: AdaLoRA, adapters: Mapping[str, Adapter]) -> tuple[AdaLoRA, State]:
    """The config with the schedule's length and, once the budget is final, only the triplets that are left."""
    members = {path: a for path, a in adapters.items() if isinstance(a, AdaLoraAdapter)}
    (allocator,) = (a for a in adapters.values() if isinstance(a, Allocator))
    cfg = dataclasses.replace(cfg, total_step=allocator.total_step)
    if not allocator.final or cfg.rank_pattern is not None:
        return cfg, {}
    state: State = {}
    pattern: dict[str, tuple[bool, ...]] = {}
    for path, member in members.items():
        rows = member.kept_rows()
        pattern[path] = tuple(rows.tolist())
        state[path] = {
            "lora_A": gathered(member.lora_A.detach())[rows],
            "lora_E": gathered(member.lora_E.detach())[rows],
            "lora_B": gathered(member.lora_B.detach())[:, rows],
        }
    return dataclasses.replace(cfg, rank_pattern=pattern), state


def set_size(cfg: AdaLoRA, init_r: int) -> AdaLoRA:
    """The config that starts with init_r triplets and ends with two thirds of them."""
    return dataclasses.replace(cfg, init_r=init_r, target_r=max(1, round(2 * init_r / 3)))


def _shortest_schedule(fields: Mapping[str, Any]) -> int:
    return int(fields.get("tinit") or 0) + int(fields.get("tfinal") or 0) + 1


def write_config(plan: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """peft's fields; where the schedule has no length yet, the shortest that peft accepts stands for that."""
    if fields["total_step"] is None:
        fields["total_step"] = _shortest_schedule(fields)
    pattern = fields["rank_pattern"] or {}
    fields["rank_pattern"] = {f"{path}.lora_E": rows for path, rows in pattern.items()} or None
    return fields


def read_config(fields: dict[str, Any], model: Any) -> dict[str, Any]:
    """Our fields from peft's."""
    if fields.get("total_step") == _shortest_schedule(fields):
        fields["total_step"] = None
    return fields


METHOD = Method(
    name="adalora",
    title="AdaLoRA",
    summary="Singular triplets beside each adapted projection, pruned by importance to a budget that all sites share.",
    paper=Paper(
        title="Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        authors="Zhang et al.",
        year=2023,
        arxiv="2303.10512",
    ),
    config=AdaLoRA,
    attach=Attach.WEIGHT,
    default_targets=("attention.query", "attention.value"),
    parameter_count=parameter_count,
    adapter=build,
    initialise=initialise,
    shared=build_shared,
    shared_count=shared_count,
    stored=stored,
    quantized_base=True,
    per_row=True,
    knob=Knob(field="init_r", apply=set_size),
    peft=PeftFormat(
        peft_type="ADALORA",
        write_config=write_config,
        read_config=read_config,
        # Fields of peft's LoRA config, which its AdaLoRA config inherits and does not use.
        ignored={
            "r": (),
            "bias": ("none",),
            "fan_in_fan_out": (),
            "alpha_pattern": (),
            "use_rslora": (),
            "megatron_core": (),
            "qalora_group_size": (),
        },
    ),
)
