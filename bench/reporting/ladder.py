"""The cost ladder as a staircase, down past the prices that the articles state."""

from __future__ import annotations

import functools
from typing import Any

import seeds
from bench.reporting.charts import CHARACTER, Axis, Chart, number
from bench.reporting.section import Figure, Scenario, Section, is_cpu, money, price_words, share, subject
from bench.results import Result

Rung = dict[str, Any]


def section(result: Result, key: str) -> Section | None:
    """None before its first rung is measured. Raises KeyError or TypeError for other keys than bench/ladder.py's."""
    data, rungs = result.data, result.data["rungs"]
    if not rungs:
        return None
    last = rungs[-1]
    target = data["target_cut"]
    notes = []
    if not data["complete"]:
        notes.append(f"Not complete: {len(rungs)} rungs are measured, so whether the target is met is not known.")
    elif len(rungs) > 1:
        met = "met" if last["cut"] >= target else "missed"
        notes.append(
            f"The last rung is {last['cut']:.1%} below the first. The articles' “more than {target:.0%} cheaper”, held "
            f"against rung 1, is {met}."
        )
    baseline = data["baseline"]
    notes.append(
        f"Rung 1 is a steelman: plain PyTorch in its fastest dtype ({baseline['dtype']}), "
        f"{baseline['speed_against_transformers']:.2f} times as fast as transformers' generate() in the same run."
    )
    notes.append(
        "Perplexity and “same top token” are of one text, with rung 1 as the reference; “same text” is the share of "
        "answer tokens that are rung 1's from the first on."
    )
    where = "CPU" if is_cpu(result) else "GPU"
    header = ["rung", "at a time", "answer tokens/s", "of the roofline", "US$/M, 3:1, busy", "against rung 1",
              "perplexity", "same top token", "same text"]  # fmt: skip
    rows = [
        [
            f"{i}. {rung['name']}",
            str(rung["batch"]),
            f"{rung['tokens_per_second']:,.1f}",
            share(rung["roofline_share"]),
            money(usd_of(rung)),
            "" if i == 1 else f"−{rung['cut']:.1%}" if rung["cut"] >= 0 else f"+{-rung['cut']:.1%}",
            f"{rung['perplexity']:.2f}",
            share(rung["top1_agreement"], 1),
            share(rung["greedy_agreement"]),
        ]
        for i, rung in enumerate(rungs, 1)
    ]
    notes += [f"{i}. {rung['name']}: {rung['technique']} ({rung['settings']})." for i, rung in enumerate(rungs, 1)]
    stands = conditions(result)
    return Section(
        key=key,
        title=f"The cost ladder on a {where}: {result.model}",
        conditions=stands,
        figures=[Figure(key, "US$ per million tokens, rung by rung", functools.partial(staircase, result), broad=True)],
        header=header,
        rows=rows,
        notes=notes,
        scenarios=[
            Scenario(
                f"Ladder, {result.model}, {where}: {rung['name']}",
                stands,
                rung["seconds_per_million"]["blended_3_to_1"],
                result.price.usd_per_device_hour if result.price else None,
                None,
            )
            for rung in reversed(rungs)
        ],
    )  # fmt: skip


def conditions(result: Result) -> str:
    data, work = result.data, result.data["workload"]
    dummy = "; the weights are made up" if data["load_format"] == "dummy" else ""
    cpu = "; measured on a CPU" if is_cpu(result) else ""
    low, high = work["tail"]
    new = work["new_tokens"]
    return (
        f"{subject(result)}, {data['threads']} threads{cpu}{dummy}. {work['requests']} requests, at most "
        f"{work['concurrency']} at a time where a rung takes several, the next as one ends; prompts of "
        f"{work['shared_prefix'] + low} to {work['shared_prefix'] + high} tokens ({work['shared_prefix']} of them "
        f"shared by every second one), answers of {new[0]} to {new[1]}. Basis busy, utilisation 100%; 3:1 blend of "
        f"prompt and answer tokens; {price_words(result)}."
    )


def usd_of(rung: Rung) -> float | None:
    return rung["usd_per_million"]["blended_3_to_1"] if rung["usd_per_million"] else None


def staircase(result: Result, width: int) -> Chart:
    """Without a price the axis is device seconds, and no price of an API can be drawn."""
    rungs: list[Rung] = result.data["rungs"]
    priced = result.price is not None
    values = [usd_of(rung) or 0.0 if priced else rung["seconds_per_million"]["blended_3_to_1"] for rung in rungs]
    lines = [(api.usd_per_million_tokens, f"{api.label} US${api.usd_per_million_tokens:.2f}")
             for api in seeds.load().apis.values()] if priced else []  # fmt: skip
    goal = values[0] * (1 - result.data["target_cut"])
    label = "US$ per million tokens, 3:1, busy" if priced else "device seconds per million tokens, 3:1, busy"
    axis = Axis.logarithmic(label, [*values, goal, *(value for value, _ in lines)])
    broad = width > 600
    left, step = (240.0, 50.0) if broad else (12.0, 66.0)
    right = width - (20.0 if broad else 12.0)
    marks = sorted([*((value, words, "mark", "marked") for value, words in lines),
                    (goal, f"{result.data['target_cut']:.0%} below rung 1", "goal", "passed")])  # fmt: skip
    top = 26.0 + 17 * len(marks)
    height = top + step * len(rungs) + 48
    chart = Chart(width, height, f"Cost ladder: {label}, from {number(values[0])} down to {number(values[-1])}.")

    def at(value: float) -> float:
        return left + axis.share(value) * (right - left)

    bottom = top + step * len(rungs)
    for tick in axis.ticks:
        chart.rule(at(tick), top - 4, at(tick), bottom, "grid")
        chart.text(at(tick), bottom + 17, number(tick), "tick", "middle")
    chart.text((left + right) / 2, bottom + 36, label, "label", "middle")
    stairs = []
    for i, value in enumerate(values):
        stairs += [(at(value), top + step * i), (at(value), top + step * (i + 1))]
    chart.path([(left, top), *stairs, (left, bottom)], "under", close=True)
    for i, (value, words, kind, text) in enumerate(marks):
        y = 14.0 + 17 * i
        chart.rule(at(value), y + 4, at(value), bottom, kind)
        fits = at(value) + CHARACTER * len(words) < width
        chart.text(at(value) + (4 if fits else -4), y + 2, words, text, "start" if fits else "end")
    chart.path(stairs, "stair")
    for i, (rung, value) in enumerate(zip(rungs, values, strict=True)):
        y = top + step * i + (step / 2 if broad else step - 20)
        name, speed = f"{i + 1}. {rung['name']}", f"{rung['tokens_per_second']:,.1f} tokens/s"
        if broad:
            chart.text(4, y - 2, name, "name")
            chart.text(4, y + 14, f"{speed}, {rung['roofline_share']:.0%} of the roofline", "quiet")
        else:
            chart.text(left + 4, y - 24, name, "name")
        chart.dot(at(value), y, 0, f"{name}: {number(value)}; {rung['technique']}")
        price = money(value) if priced else f"{number(value)} s"
        cut = "" if i == 0 else f"−{rung['cut']:.0%}" if rung["cut"] >= 0 else f"+{-rung['cut']:.0%}"
        wide = 9.6 * len(price) + (8 + CHARACTER * len(cut)) + 14
        x = at(value) + 11
        if x + wide > width:
            x = at(value) - 2 - wide
        chart.text(x, y + 5, price, "price")
        chart.text(x + 9.5 * len(price) + 6, y + 5, cut, "cut")
    return chart
