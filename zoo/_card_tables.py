"""The Markdown tables of cards and README, all rendered from results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import files
from zoo.errors import ConfigError

if TYPE_CHECKING:
    from zoo.cards import Card, Control, Result


_PRECISIONS = {"32-true": ", in float32", "bf16-mixed": ", in bfloat16"}


def fill(text: str, marker: str, content: str, where: str) -> str:
    """Replace what stands between `<!-- zoo:marker -->` and `<!-- /zoo:marker -->`.

    Args:
        text: The whole Markdown file.
        marker: Which place to fill.
        content: What to put there.
        where: The file, for error messages.

    Raises:
        ConfigError: When `text` does not have both markers exactly once, in that order.
    """
    opening, closing = f"<!-- zoo:{marker} -->", f"<!-- /zoo:{marker} -->"
    before, found, rest = text.partition(opening)
    _, closed, after = rest.partition(closing)
    if not (found and closed) or text.count(opening) + text.count(closing) != 2:
        raise ConfigError(f"{where}: expected {opening} and then {closing}, once each")
    return f"{before}{opening}\n{content}\n{closing}{after}"


def fill_file(path: Path, marker: str, content: str) -> None:
    """As `fill`, in a file such as a README.

    Raises:
        ConfigError: When it cannot be read, or does not have both markers exactly once, in that
            order.
        CheckpointError: When it cannot be written.
    """
    files.write_bytes(path, _filled(path, marker, content).encode())


def check_file(path: Path, marker: str) -> None:
    """Check that `fill_file` will find its place, before there is anything to put there.

    Raises:
        ConfigError: As of `fill_file`.
    """
    _filled(path, marker, "")


def _filled(path: Path, marker: str, content: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a card or README: {error}") from error
    return fill(text, marker, content, where=str(path))


def fill_all(
    card: Card,
    diagnostics: Mapping[str, Any] | None = None,
    analog: Mapping[str, Any] | None = None,
) -> str:
    """The card's body with every table rendered anew.

    Args:
        card: The card.
        diagnostics: What `zoo evaluate --diagnose` recorded; a body that has no place for them,
            as one that was written before, stays without.
        analog: What `zoo evaluate --analog --record` recorded, likewise.

    Raises:
        ConfigError: When the body lacks a marker.
    """
    body = card.body
    tables = [
        ("results", _results(card)),
        ("controls", controls_table(card.controls)),
        ("reported", _reported(card)),
        ("files", _files(card)),
    ]
    if "<!-- zoo:diagnostics -->" in body:
        tables.append(("diagnostics", _diagnostics(card, diagnostics or {})))
    if "<!-- zoo:analog -->" in body:
        tables.append(("analog", _analog(analog or {})))
    for marker, table in tables:
        body = fill(body, marker, table, where=f"card of {card.name}")
    return body


def models(cards: Iterable[Card]) -> str:
    """The README's table of models, one line for each card."""
    return table(
        ["Model", "Task", "Parameters", "Measured", "95 % interval", "Samples", "Size", "Licence"],
        [
            [
                f"[`{card.name}`](model_cards/{card.name}.md)",
                card.task,
                f"{card.parameters:,}",
                f"{_number(card.primary.value)} {_words(card.primary.metric)}, "
                f"{card.primary.dataset} {card.primary.split}",
                _interval(card.primary),
                f"{card.primary.n:,} {card.primary.unit}s",
                f"{card.size / 1e6:.1f} MB",
                card.weights_license,
            ]
            for card in cards
        ],
    )


def _results(card: Card) -> str:
    return "\n\n".join(filter(None, (_result_table(card), _reproduction(card))))


def _reproduction(card: Card) -> str:
    """What came out when the recipe was run again; nothing where nobody has recorded that."""
    found = card.training.get("reproduction")
    if not found:
        return ""
    outcomes = [
        f"{_number(one['value'])} ({one['protocol']}; "
        f"{'within' if one['passed'] else '**not within**'} {_number(one['tolerance'])} of the "
        f"recorded {_number(one['recorded'])})"
        for one in found["outcomes"]
    ]
    return (
        f"Trained again by `{found['command']}` on {found['date']}, with seed {found['seed']}"
        f"{_PRECISIONS.get(found['precision'], '')}, on {found['machine']}, in "
        f"{found['cpu_minutes']:,.0f} CPU minutes: {', '.join(outcomes)}."
    )


def _result_table(card: Card) -> str:
    return table(
        [
            "Metric",
            "Value",
            "Interval",
            "Samples",
            "Seeds",
            "Spread over seeds",
            "Protocol",
            "Command",
        ],
        [
            [
                _words(result.metric),
                f"**{_number(result.value)}**" if result.primary else _number(result.value),
                f"{_interval(result)} ({result.confidence:.0%}, {result.interval_method})",
                f"{result.n:,} {result.unit}s",
                ", ".join(map(str, result.seeds)),
                _number(result.seed_spread),
                f"{result.protocol}; {result.dataset}, {result.split}",
                f"`{result.command}`",
            ]
            for result in card.results
        ],
    )


def controls_table(controls: Sequence[Control]) -> str:
    """Controls, one line for each and its protocol, the model first."""
    text = _control_table(controls)
    if "; seeds ±" not in text:
        return text
    return (
        f"{text}\n\nIntervals of differences are for other samples of the test set, with these "
        "seeds; ± is for other seeds (95 %, Student's)."
    )


def _control_table(controls: Sequence[Control]) -> str:
    return table(
        [
            "Net",
            "Differs in",
            "Protocol",
            "Value",
            "Spread over seeds",
            "Difference",
            "Parameters",
            "MACs",
            "Speed",
            "CPU minutes",
        ],
        [
            [
                f"{control.name} (`{control.recipe}`)",
                control.differs,
                control.result.protocol,
                f"{_number(control.result.value)} {_words(control.result.metric)}",
                f"{_number(control.result.seed_spread)} over {len(control.result.seeds)}",
                difference(control, controls),
                f"{control.parameters:,}",
                "-" if control.macs is None else f"{control.macs:,}",
                control.speed or "-",
                "-" if control.result.cpu_minutes is None else f"{control.result.cpu_minutes:.0f}",
            ]
            for control in controls
        ],
    )


def difference(control: Control, controls: Sequence[Control]) -> str:
    """Of a control to the model, or to what it is compared with, with its intervals.

    Args:
        control: the control.
        controls: all controls of the weight, the model first.
    """
    if control.difference is None or control.difference_interval is None:
        return "-"
    low, high = control.difference_interval
    against = f" against {control.against}" if control.against else ""
    others = [c for c in controls if c is not control]
    alike = [c for c in others if c.result.protocol == control.result.protocol]
    other = next((c for c in alike if c.name == (control.against or controls[0].name)), None)
    error = None if other is None else control.seed_error(other)
    seeds = "" if error is None else f"; seeds ±{error:.4f}"
    return f"{control.difference:+.4f} ({low:+.4f} to {high:+.4f}{seeds}){against}"


def _diagnostics(card: Card, found: Mapping[str, Any]) -> str:
    """The metric under other solvers, and what each ODE block does to its states."""
    if not found:
        return "None."
    refinement = found["refinement"]
    parts = [
        _solver_table(found["solver_curve"], _words(card.primary.metric)),
        f"Refining the steps changes it by {refinement['spread']:.5f} at the most (tolerance "
        f"{refinement['tolerance']:g}): {refinement['verdict']}.",
        _block_table(found["blocks"]),
    ]
    # Results from before this was measured have none, nor have blocks without parameters.
    if any(block.get("estimator_ratio") is not None for block in found["blocks"]):
        parts.append(_gradient_table(found["blocks"]))
    if "lipschitz" in found:
        bound = found["lipschitz"]
        upper = bound["log10_upper"]
        above = "no upper bound is known" if upper is None else f"at most 10^{upper:.1f}"
        parts.append(
            f"Lipschitz constant of the logits in the image, by {bound['samples']} images: at "
            f"least {bound['lower_with_midpoints']:.1f}, where the local ones have a mean of "
            f"{bound['mean']:.1f}; {above}{', which says nothing' if bound['vacuous'] else ''}."
        )
    if "batch_invariance" in found:
        own, adaptive = found["batch_invariance"]["trained"], found["batch_invariance"]["dopri5"]
        parts.append(
            f"Largest change of a logit where an image comes alone instead of in a batch: "
            f"{own:.1e} with the solver of the training, {adaptive:.1e} with dopri5."
        )
    return "\n\n".join(parts)


def _solver_table(curve: Sequence[Mapping[str, Any]], metric: str) -> str:
    return table(
        ["Solver", "Steps or tolerance", "Evaluations", metric.capitalize()],
        [
            [
                entry["solver"] + ("" if index else ", as trained"),
                str(entry["steps"]) if "steps" in entry else f"{entry['tolerance']:g}",
                str(entry.get("nfe", "-")),
                f"{entry['value']:.5f}" if "value" in entry else entry["error"],
            ]
            for index, entry in enumerate(curve)
        ],
    )


def _block_table(blocks: Sequence[Mapping[str, Any]]) -> str:
    return table(
        [
            "Block",
            "Radius of a step",
            "Gain of all steps (median, 95 %)",
            "Lyapunov exponents",
            "Log-norm integral",
            "Stiffness",
            "Adjoint's cosine",
            "Alarms",
        ],
        [
            [
                f"{index}: {block['steps']} steps of {block['method']}",
                f"{max(block['step_radius']):.3f}",
                f"{block['product_gain'][-1]:.3g}, {block['product_gain_p95']:.3g}",
                ", ".join(f"{value:.2f}" for value in block["exponents"]),
                f"{block['log_norm_integral']:.2f}",
                f"{block['stiffness']:.3f}",
                f"{block['adjoint_cosine']:.5f}",
                "; ".join(block["alarms"]) or "none",
            ]
            for index, block in enumerate(blocks, 1)
        ],
    )


def _gradient_table(blocks: Sequence[Mapping[str, Any]]) -> str:
    def growth(variances: Sequence[float]) -> str:
        return f"{variances[-1] / variances[0]:.3g}" if variances[0] else "-"

    return table(
        [
            "Gradient of block",
            "Its cosine with that through the last step",
            "with that through half of the steps or more",
            "Its variance after all steps over that after one",
            "Its variance over that of evolution strategies",
        ],
        [
            [
                str(index),
                f"{block['gradient_cosines'][0]:.3f}",
                f"{block['gradient_cosines'][-2]:.3f}" if block["steps"] > 1 else "-",
                growth(block["gradient_variances"]),
                f"{block['estimator_ratio']:.3g}",
            ]
            for index, block in enumerate(blocks, 1)
            if block.get("estimator_ratio") is not None
        ],
    )


def _analog(found: Mapping[str, Any]) -> str:
    """Accuracies with quantised, noisy activations and weights, a line for each net."""
    if not found:
        return "None."
    sweeps, settings = found["sweeps"], found["settings"]
    results = table(
        ["Net", "Images", "Digital"]
        + [f"{one['bits']:g} bits, noise {one['noise']:g}" for one in sweeps[0]["results"]],
        [
            [
                sweep["name"],
                f"{sweep['results'][0]['n']:,}",
                _number(sweep["digital"]),
                *(_with_spread(one["accuracies"]) for one in sweep["results"]),
            ]
            for sweep in sweeps
        ],
    )
    draws = settings["repeats"]
    return (
        f"{results}\n\nAccuracy: mean"
        f"{f' and standard deviation over {draws} draws' if draws > 1 else ' of one draw'} of the "
        f"noise, scale {settings['scale']}. Measured by `{found['command']}` on {found['date']}."
    )


def _with_spread(values: Sequence[float]) -> str:
    mean = _number(statistics.fmean(values))
    return f"{mean} ({_number(statistics.stdev(values))})" if len(values) > 1 else mean


def _reported(card: Card) -> str:
    return table(
        ["Metric", "Value", "Source", "Evidence", "How our protocol differs"],
        [
            [
                _words(reported.metric),
                _number(reported.value),
                reported.source,
                reported.evidence,
                reported.difference,
            ]
            for reported in card.reported
        ],
    )


def _files(card: Card) -> str:
    return table(
        ["File", "Bytes", "sha256"],
        [[record.name, f"{record.size:,}", f"`{record.sha256}`"] for record in card.files],
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; "None." without rows."""
    if not rows:
        return "None."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _interval(result: Result) -> str:
    return f"{_number(result.interval[0])} to {_number(result.interval[1])}"
