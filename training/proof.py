"""The proof of a merge: what its certificate says, and which of its numbers are out of bounds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

# Half or twice the scale is off by a third of the effect or more; 16-bit arithmetic by some hundredths of a nat.
PROBE_ERROR_SHARE = 0.25
PROBE_ERROR_NATS = 0.05


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChatSection(Section):
    mode: Literal["model", "qwen"]
    template_sha256: str
    default_system_prompt: str | None  # what a server must render where a chat has no system message
    stop_token_ids: tuple[int, ...]

    @property
    def added_system_prompt(self) -> str | None:
        """The system text to add where a chat has none and the model's own template would render another."""
        return self.default_system_prompt if self.mode == "qwen" else None


class DeltaSurvival(Section):
    """The share of each matrix's update that the written weights hold: 1.0 is all of it, and once."""

    matrices: int
    share: float  # of all updates together
    share_min: float
    share_median: float
    share_off_allowed: float  # from 1.0, of `share` and of `share_median`
    worst: dict[str, float]  # share by weight name, of the five farthest from 1.0

    @property
    def kept(self) -> bool:
        """Whether rounding left the update as it is, within what is allowed."""
        return all(abs(share - 1) <= self.share_off_allowed for share in (self.share, self.share_median))


GreedyOn = Literal["own replies", "held-out replies"]


class VariantDistance(Section):
    """How far a variant's answers stand from a reference variant's, over the same reply tokens."""

    variant: str
    reference: str
    kl_nats_mean: float  # a token's KL(reference || variant)
    kl_nats_max: float
    top1_agreement: float
    nll_nats_difference: float  # variant minus reference, a token
    nll_nats_interval: tuple[float, float]  # 95 %, by bootstrap over rows
    greedy_prefix_mean: float  # tokens of the reference's greedy reply that the variant would write too
    greedy_tokens_mean: float  # of the reference's greedy reply
    # What the prefixes are of: the held-out replies where the reference did not fit in memory to write its own.
    greedy_on: GreedyOn = "own replies"


class ProbeError(Section):
    """Mean absolute differences of log-probabilities over an adapter's probes."""

    error_nats: float  # base + adapter as loaded, from what was recorded when it was trained
    effect_nats: float  # the base alone from base + adapter, both as recorded

    @property
    def allowed_nats(self) -> float:
        return max(PROBE_ERROR_SHARE * self.effect_nats, PROBE_ERROR_NATS)


class MergeCertificate(Section):
    """How far a merged model stands from base + adapter, over `positions` reply tokens of `rows` held-out rows."""

    format_version: Literal[1] = 1
    adapter_digest: str
    base_fingerprint: str
    merged_fingerprint: str
    chat: ChatSection  # the adapter's: a server must render the merged model's prompts as it was trained
    dtype: str
    rows: int
    positions: int
    kl_nats_mean: float  # a token's KL(base + adapter || merged)
    kl_nats_max: float
    kl_nats_allowed: float
    kl_nats_base_mean: float  # a token's KL(base + adapter || base): what the adapter changed
    top1_agreement: float
    top1_agreement_base: float
    nll_nats_adapter: float
    nll_nats_merged: float
    onto: Literal["plain", "dequantised"] = "plain"  # base weights as stored, or as NF4 left them in training
    kl_nats_rounding: float | None = None  # a token's KL to the same model with its weights rounded anew; 16 bits only
    survival: DeltaSurvival | None = None
    dtype_reason: str | None = None  # why another than the base's own was chosen, or why that one had to stay
    probes: ProbeError | None = None  # None: recorded on another form of the base, or before there were any
    comparison: tuple[VariantDistance, ...] = ()
    onto_reason: str | None = None  # why this way to merge, of two that were compared

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Each number that is out of bounds, with its bound."""
        found = []
        if not self.kl_nats_mean <= self.kl_nats_allowed:
            found.append(f"KL {self.kl_nats_mean:.1e} nats a token is above {self.kl_nats_allowed:.1e}")
        if self.survival is not None:
            found += _survival_failures(self.survival, self._wider_dtypes())
        if self.probes is not None and not self.probes.error_nats <= self.probes.allowed_nats:
            found.append(
                f"the adapter as loaded stands {self.probes.error_nats:.3f} nats a token from its probes, as recorded "
                f"when it was trained, above {self.probes.allowed_nats:.3f}: its scale, its base or peft is another"
            )
        return tuple(found)

    def _wider_dtypes(self) -> str:
        """Returns those that round less; not float16 where it was tried, or cannot hold a weight."""
        return "float32" if self.dtype == "float16" or self.dtype_reason else "float16 or float32"


def _survival_failures(survival: DeltaSurvival, wider: str) -> list[str]:
    off = survival.share_off_allowed
    worst = ", ".join(f"{name} {share:.3f}" for name, share in survival.worst.items())
    remedy = f"write it with --dtype {wider}; worst: {worst}"
    return [
        f"{share:.3f} of {what} is left by rounding, not {1 - off:g} to {1 + off:g}; {remedy}"
        for share, what in ((survival.share, "the update"), (survival.share_median, "the median matrix's update"))
        if not abs(share - 1) <= off
    ]
