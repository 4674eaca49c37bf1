"""Config of what serving costs, and of what counts as served well."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from serve_app.config.section import Section

_HOURS_PER_YEAR = 8766.0  # of 365.25 days
_SECONDS_PER_HOUR = 3600.0


class CostSection(Section):
    """The price of power and hardware, for one model replica. Without prices no cost is told.

    Joules come from the card's or the package's own counter where it can be read; elsewhere from
    the watts given here. The metric's label `source` says which.
    """

    currency: str = Field("EUR", description="Code of the currency of all prices (ISO 4217).")
    electricity_price_per_kwh: float = Field(0.0, ge=0, description="Price of a kilowatt hour.")
    hardware_price: float = Field(
        0.0, ge=0, description="Price of the hardware that one replica takes: card, its host share."
    )
    hardware_years: float = Field(4.0, gt=0, description="Years over which that price is spread.")
    idle_watts: float = Field(
        0.0, ge=0, description="Power of a replica at rest, where no energy counter can be read."
    )
    busy_watts: float = Field(
        0.0, ge=0, description="Power of a replica at work, where no energy counter can be read."
    )
    host_watts: float = Field(
        0.0, ge=0, description="Power of the machine around, per replica; added to what is read."
    )
    budget_per_hour: float | None = Field(
        None, gt=0, description="Cost of an hour, over all replicas, from which on an alert fires."
    )

    @field_validator("currency")
    @classmethod
    def _check_currency(cls, value: str) -> str:
        if not (len(value) == 3 and value.isascii() and value.isalpha()):
            raise ValueError(f"expected a code of three letters such as EUR, got {value!r}")
        return value.upper()

    @model_validator(mode="after")
    def _check_watts(self) -> Self:
        if "busy_watts" in self.model_fields_set and self.busy_watts < self.idle_watts:
            raise ValueError(
                f"busy_watts ({self.busy_watts:g}) is less than idle_watts ({self.idle_watts:g})"
            )
        if self.budget_per_hour is not None and not self.has_prices:
            raise ValueError("budget_per_hour needs electricity_price_per_kwh or hardware_price")
        return self

    @property
    def has_prices(self) -> bool:
        """Whether a cost can be told."""
        return bool(self.electricity_price_per_kwh or self.hardware_price)

    @property
    def hardware_price_per_s(self) -> float:
        """Price of a second of the hardware, spread evenly over its years."""
        return self.hardware_price / (self.hardware_years * _HOURS_PER_YEAR * _SECONDS_PER_HOUR)


class SloSection(Section):
    """What counts as served well: goodput counts the sequences that meet both limits."""

    ttft_ms: float = Field(500.0, gt=0, description="Longest time to first token.")
    tpot_ms: float = Field(100.0, gt=0, description="Longest mean time per token after the first.")
