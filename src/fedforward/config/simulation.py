"""The section `[simulation]`: what goes wrong with simulated clients, and who of them attacks."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedforward.config.fields import Chance, Count, Section

#: Values of `simulation.attack` that have a number.
WITH_FACTOR = ("scale", "constant", "random", "little-is-enough")


class SimulationSection(Section):
    """[simulation], of what goes wrong with clients; every choice follows from run.seed"""

    dropout: Chance = Field(0.0, description="chance that a client is gone for a round")
    straggler: Chance = Field(0.0, description="chance that a report comes after the deadline")
    byzantine: Chance = Field(
        0.0,
        description="share of the clients that report wrong numbers, wrong states or nonsense",
    )
    late_join: Annotated[int, Field(ge=0)] = Field(
        0, description="so many clients (the last ones) join only in round late_join_round"
    )
    late_join_round: Count = Field(1, description="see late_join")
    attack: Literal[
        "none",
        "sign-flip",
        "scale",
        "constant",
        "random",
        "little-is-enough",
        "trim",
        "krum",
        "label-flip",
    ] = Field(
        "none",
        description="what the clients in attackers report in place of what they have measured; "
        '"label-flip" gives them wrong labels instead',
    )
    attackers: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="numbers of the clients that do so, from 0"
    )
    attack_factor: float | None = Field(
        None,
        description="of scale: what multiplies projected gradients; of constant and random: their "
        "size, in multiples of the client's own; of little-is-enough: z, in standard deviations; "
        "default 10, and a z of 1.5",
    )

    @property
    def plain(self) -> bool:
        """Whether nothing goes wrong."""
        return self == SimulationSection()

    @property
    def factor(self) -> float:
        """`attack_factor`, or its default."""
        default = 1.5 if self.attack == "little-is-enough" else 10.0
        return default if self.attack_factor is None else self.attack_factor

    @model_validator(mode="after")
    def _an_attack_has_attackers(self) -> "SimulationSection":
        if self.attack == "none":
            for key, given in (
                ("attackers", self.attackers),
                ("attack_factor", self.attack_factor),
            ):
                if given not in ([], None):
                    raise ValueError(
                        f"{key} = {given!r} says more of an attack, and attack = 'none'; name an "
                        f"attack, as in attack = 'sign-flip', or leave {key} out"
                    )
        elif not self.attackers:
            raise ValueError(
                f"attack = {self.attack!r} needs attackers, the numbers of the clients that lie, "
                "as in attackers = [3, 7]"
            )
        elif self.attack_factor is not None and self.attack not in WITH_FACTOR:
            raise ValueError(
                f"attack_factor = {self.attack_factor:g} is a number for "
                f"{', '.join(map(repr, WITH_FACTOR))}, and attack = {self.attack!r}; leave it out"
            )
        if len(set(self.attackers)) < len(self.attackers):
            raise ValueError(
                f"attackers = {self.attackers!r} names a client twice; leave one of them out"
            )
        return self
