"""One variant being trained, with everything that belongs to it: weights, optimizer, counters, running sums."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from train.collective import sum_gradients_
from train.config import Kernels, LearnerConfig
from train.data.batch import Batch
from train.optim import can_fuse, fused_update_, make_optimizer, parameters_of, plain_update_, set_lr
from train.recording import Recorder
from train.saes.base import SAE, Batches, KeptConfig
from train.saes.kept import sparse_pays
from train.schedule import Clock, dead_after, default_lr, lr_factor
from train.sharding import DIMENSIONS, Shards
from train.tally import Counted, Tally

LOOK_EVERY = 16  # steps
LISTED = 64  # latents that may be dead are listed so many more or fewer at a time


class Learner:
    """A variant, its optimizer and its place in time.

    Attributes:
        step: steps taken.
        state: "running", "finished", "diverged" or "failed".
        reason: why it is in this state, one line.
        seconds: wall time of its own steps; on a GPU, of queueing them.
        fused: whether kernels of our own take Adam's step on unit rows.
        shards: how its latents lie on ranks; the SAE that it is given lies so already. Steps are plain then.
        recorder: plays steps again that are alike; None where they are taken one by one.
        looks: whether the host lists the latents that may be dead now and then, for AuxK: to ask at every step would
            wait for a GPU.
        tally: what its steps come to.
        alarms: what was odd, by kind, as it was first said.
        best_ev, best_step: of its checkpoints, by held-out explained variance.
    """

    def __init__(
        self,
        config: LearnerConfig,
        sae: SAE,
        n_steps: int,
        device: torch.device,
        precision: torch.dtype,
        kernels: Kernels = "auto",
        shards: Shards | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.config, self.n_steps, self.device, self.precision = config, n_steps, device, precision
        self.shards, self.recorder = shards, recorder
        self.looks = device.type == "cuda" and shards is None and hasattr(sae.config, "aux_alpha")
        self.sae = sae.to(device)
        share = sae.config.k / sae.d_sae if isinstance(sae.config, KeptConfig) else 0.0  # others look at every step
        pays = kernels == "sparse" or (kernels == "auto" and sparse_pays(device, share))
        self.sae.sparse = sae.trained and pays and shards is None
        for parameter in self.sae.parameters():
            # checkpoints are contiguous; fused Adam walks memory, and would pair the wrong elements after a restore
            parameter.data = parameter.data.contiguous()
        self.optimizer = make_optimizer(self.sae, config)
        self.fused = self.sae.sparse and can_fuse(self.unit_rows())
        self.parameters = parameters_of(self.optimizer)
        names = {id(parameter): name for name, parameter in self.sae.named_parameters()}
        self.names = [names[id(parameter)] for parameter in self.parameters]
        self.everywhere = [one for one, name in zip(self.parameters, self.names, strict=True) if name not in DIMENSIONS]
        self.peak_lr = config.lr or sae.lr_scale * default_lr(n_steps, sae.d_sae)
        self.step = 0
        self.state, self.reason = "running", ""
        self.alarms: dict[str, str] = {}
        self.tally = Tally(self.sae, device)
        self.best_ev: float | None = None
        self.best_step: int | None = None
        self.seconds = 0.0

    @property
    def name(self) -> str:
        return self.config.name

    def clock(self, batch_tokens: int) -> Clock:
        return Clock(self.step, self.n_steps, batch_tokens)

    def lr(self, clock: Clock) -> float:
        """The learning rate of a step, of parameters without a rate of their own."""
        factor = lr_factor(clock, self.config.warmup_share, self.config.decay_share)
        return self.peak_lr * factor * self.sae.rates(clock)[0]

    def train_step(self, batch: Batch, batch_tokens: int) -> None:
        """One step on a batch in raw units, x in float32."""
        self.queue_step(batch, batch_tokens)
        self.join()

    def queue_step(self, batch: Batch, batch_tokens: int) -> None:
        """One step; work that is queued afterwards sees what it does only after `join`."""
        clock = self.clock(batch_tokens)
        with self._aside(clock):
            lr, (_, own) = self.lr(clock), self.sae.rates(clock)
            for group, factor in zip(self.optimizer.param_groups, (1.0, own), strict=False):
                set_lr(group, lr * factor)
            self._look_for_dead(clock)
            take = functools.partial(self._take_step, clock)
            if self.recorder is None:
                counted = take(batch)
            else:
                counted = self.recorder.step(take, batch, self.sae.host_facts(clock))
            self.step += 1
            self.tally.count(counted, batch, self.step)

    def _aside(self, clock: Clock) -> AbstractContextManager[None]:
        """Where a step is queued: aside if it can be recorded.

        Others may look at documents, which whoever first wants them brings to the device for all learners.
        """
        if self.recorder is None or self.sae.host_facts(clock) is None:
            return contextlib.nullcontext()
        return self.recorder.tape.aside()

    def join(self) -> None:
        """Whatever is queued from here on comes after this learner's steps."""
        if self.recorder is not None:
            self.recorder.tape.join()

    @torch.no_grad()
    def _look_for_dead(self, clock: Clock) -> None:
        """List the latents that can be dead before the next look, those that are now and those that soon may be."""
        if not self.looks or (self.step % LOOK_EVERY and self.sae.may_die is not None):
            return
        least = dead_after(clock.n_steps, clock.batch_tokens) - (LOOK_EVERY - 1) * clock.batch_tokens
        found = list_silent(self.sae.tokens_silent, least, self.sae.may_die)
        if found is not self.sae.may_die:
            self.sae.may_die = found
            if self.recorder is not None:
                self.recorder.forget()

    def _take_step(self, clock: Clock, batch: Batch) -> Counted:
        """The part of a step that is the device's alone: what it is told by the host must be in `SAE.host_facts`."""
        scaled = batch.with_x(batch.x * self.sae.scale)
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            output = self.sae.training_pass(scaled, clock)
        total = output.total
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        sum_gradients_(self.parameters, self.everywhere)
        norm = self._update()
        self.sae.after_step(clock)
        return self.tally.add(scaled, output, total.detach(), norm)

    def unit_rows(self) -> list[Tensor]:
        """The matrices whose rows are kept at unit norm."""
        return [self.sae.get_parameter(name) for name in self.sae.unit_rows]

    def _update(self) -> Tensor:
        if self.fused:
            return fused_update_(self.optimizer, self.unit_rows(), self.config.grad_clip)
        return plain_update_(self.optimizer, self.unit_rows(), self.everywhere, self.config.grad_clip)

    def at_landmark(self) -> bool:
        """Whether the variant wants to look at batches before the step about to be taken."""
        return self.step in self.sae.landmarks(self.n_steps)

    @torch.no_grad()
    def revise(self, batches: Batches, batch_tokens: int) -> None:
        """Let the variant change itself at a landmark; the optimizer's averages of what it names start anew.

        Adam's step count goes on, so a second average of 0 would make the first steps several times too large: it
        starts at the mean of the entries that stay, or of all where none does.
        """
        if self.recorder is not None:
            self.recorder.forget()
        for name, mask in self.sae.revise(batches, self.clock(batch_tokens)).items():
            state = self.optimizer.state.get(self.sae.get_parameter(name))
            if state:
                squares = state["exp_avg_sq"]
                stays = ~mask.expand_as(squares) | mask.all()
                state["exp_avg"].masked_fill_(mask, 0.0)
                squares.copy_(torch.where(mask, (squares * stays).sum() / stays.sum(), squares))

    def read_metrics(self) -> dict[str, Any]:
        """What a metrics line says of the steps since the last one: see `Tally.read`."""
        return {"step": self.step} | self.tally.read()

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that decides the rest of the run, by file: weights, optimizer, sums."""
        optimizer = {}
        for number, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                optimizer[f"{number}.{name}"] = self._whole(self.names[number], torch.as_tensor(value))
        sums = self.tally.tensors()
        if self.sae.may_die is not None:
            sums["may_die"] = self.sae.may_die
        weights = {name: self._whole(name, value) for name, value in self.sae.state_dict().items()}
        return {"weights": weights, "optimizer": optimizer, "sums": sums}

    def _whole(self, name: str, own: Tensor) -> Tensor:
        return own if self.shards is None else self.shards.whole(name, own)

    def _own(self, name: str, whole: Tensor) -> Tensor:
        return whole if self.shards is None else self.shards.cut(name, whole)

    def whole_sae(self) -> SAE:
        """The SAE with all its latents; on every rank that has some of them."""
        if self.shards is None:
            return self.sae
        sae = type(self.sae)(self.sae.config, self.sae.d_in)
        sae.load_state_dict({name: self._whole(name, value) for name, value in self.sae.state_dict().items()})
        return sae.to(self.device)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors."""
        return {
            "step": self.step,
            "state": self.state,
            "reason": self.reason,
            "alarms": self.alarms,
            "best_ev": self.best_ev,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "options": self.sae.config.model_dump(mode="json"),
        }

    def restore(self, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Become exactly the learner that `tensors()` and `facts()` were taken from."""
        self.sae.load_state_dict({name: self._own(name, value) for name, value in tensors["weights"].items()})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = self._own(self.names[int(number)], value)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        sums = dict(tensors["sums"])
        may_die = sums.pop("may_die", None)
        self.sae.may_die = may_die.to(self.device, copy=True) if may_die is not None and self.looks else None
        self.tally.restore(sums)
        if self.recorder is not None:
            self.recorder.forget()
        self.step, self.state, self.reason = facts["step"], facts["state"], facts["reason"]
        self.alarms = dict(facts["alarms"])
        self.best_ev, self.best_step, self.seconds = facts["best_ev"], facts["best_step"], facts["seconds"]

    @property
    def final_loss(self) -> float | None:
        """The last finite loss; None only when no step was taken."""
        self.join()  # one that fails is asked before its step is done
        value = float(self.tally.last_loss)
        return value if value == value else None


def list_silent(tokens_silent: Tensor, least: int, listed: Tensor | None) -> Tensor:
    """Latents, ascending, among which all are that were silent for `least` tokens or more; waits for the device.

    As many as were `listed`, and in their place, while that will do: another number makes another recording, and which
    latents are silent changes at almost every look.
    """
    n = int((tokens_silent >= least).sum())
    if listed is None or not n <= len(listed) <= 2 * n + LISTED:
        room = -(-5 * n // (4 * LISTED)) * LISTED  # a quarter more
        listed = tokens_silent.new_empty(min(room, len(tokens_silent)))
    most_silent = tokens_silent.sort(descending=True, stable=True).indices[: len(listed)]
    return listed.copy_(most_silent.sort().values)
