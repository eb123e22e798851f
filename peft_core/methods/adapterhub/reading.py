"""What an AdapterHub bottleneck reads and what it leaves of the residual stream, from the switches of its config.

With h the block's output and r the residual stream, a native bottleneck writes y in place of r + h, so that the block's
output becomes y - r; a hooked one writes the block's output itself. Either way the result is one of

    h + a(u) + residual * r              u = h, r or h + r
    layer_norm(h + a(u)) + residual * r

Running example: a native sequential bottleneck with residual_before_ln off counts r twice
    y = r + (r + h) + a(r + h)     ->     Reading(reads="h + r", residual=1)
"""

from __future__ import annotations

from typing import Literal, NamedTuple, NoReturn

from peft_core.methods.adapterhub.fields import flag, wrong
from peft_core.methods.adapterhub.layout import Layout, Place
from peft_core.methods.ledger import ConfigLedger, refuse


class Reading(NamedTuple):
    reads: Literal["h", "r", "h + r"]
    residual: float
    norm_out_of: Literal["a", "h + a"]
    base_norm: str | None  # a norm of the base that is applied to what is read


class Switches(NamedTuple):
    is_parallel: bool
    original_ln_before: bool
    original_ln_after: bool
    residual_before_ln: bool
    adapter_residual_before_ln: bool
    ln_before: bool
    ln_after: bool

    @property
    def down_module(self) -> str:
        """The down projection's name; a norm before it takes the first place."""
        return f"adapter_down.{int(self.ln_before)}"

    def reading(self, layout: Layout, place: Place, num_layers: int) -> Reading:
        """What a bottleneck of this configuration reads at a place of the architecture.

        Raises:
            UnsupportedAdapter: a combination that no form has, or that the library itself refuses.
        """
        if layout.is_hooked and not self.original_ln_after:
            refuse("original_ln_after", False, "the library itself refuses this on bases that it hooks.")
        kept = 0 if layout.is_hooked or self.original_ln_after else -1
        beside = layout.feed_forward_residual if place == "output_adapters" else "own"
        if beside == "none" and self.is_parallel:
            refuse("is_parallel", True, "the library itself fails on this in feed-forward blocks beside the attention.")
        if beside == "after attention":
            self._refuse_other_block()
        if self.is_parallel:
            return Reading("r", kept, "a", None)
        reads_sum = self.original_ln_before and beside == "own"
        base_norm = layout.norm_of(place, num_layers) if reads_sum else None
        counts_twice = reads_sum and not self.residual_before_ln
        norms_sum = self.ln_after and self.adapter_residual_before_ln
        if base_norm is not None and counts_twice:
            _refuse_residual("a bottleneck whose residual is the base's normalised output")
        if base_norm is not None and self.ln_before:
            refuse("ln_before", True, "two norms in a row before a bottleneck are not served.")
        if counts_twice and norms_sum:
            _refuse_residual("a norm over the bottleneck, the block and the residual stream together")
        return Reading(
            reads="h + r" if reads_sum else "h",
            residual=kept + int(counts_twice),
            norm_out_of="h + a" if norms_sum else "a",
            base_norm=base_norm,
        )

    def _refuse_other_block(self) -> None:
        """Refuse what would read the stream behind the other block, which stands beside this one."""
        needing = (("is_parallel", True), ("original_ln_before", True), ("original_ln_after", False))
        for field, value in needing:
            if getattr(self, field) is value:
                refuse(field, value, "reading what the attention beside the block has added is not served.")


def read_switches(ledger: ConfigLedger) -> Switches:
    """Take the switches off a bottleneck's config.

    Raises:
        UnsupportedAdapter: residual_before_ln is "post_add".
    """
    residual_before_ln: object = ledger.use("residual_before_ln", True)
    if residual_before_ln == "post_add":
        refuse("residual_before_ln", "post_add", "the library itself fails on this in most decoders: not served.")
    if not isinstance(residual_before_ln, bool):
        raise wrong("residual_before_ln", residual_before_ln, "true or false")
    return Switches(
        is_parallel=flag(ledger, "is_parallel", default=False),
        original_ln_before=flag(ledger, "original_ln_before", default=False),
        original_ln_after=flag(ledger, "original_ln_after", default=True),
        residual_before_ln=residual_before_ln,
        adapter_residual_before_ln=flag(ledger, "adapter_residual_before_ln", default=False),
        ln_before=flag(ledger, "ln_before", default=False),
        ln_after=flag(ledger, "ln_after", default=False),
    )


def _refuse_residual(what: str) -> NoReturn:
    refuse("residual_before_ln", False, f"{what} is not served. Train with residual_before_ln=True.")
