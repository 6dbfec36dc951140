"""The `zoo` command: one function per subcommand, each a thin layer over the Python functions.

Exit status: 0 done, 1 a verdict that failed, 2 bad input, 130 interrupted. Results go to standard
output (with `--json` as one JSON document), everything else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zoo.errors import DataError, ZooError, nearest

if TYPE_CHECKING:
    from zoo.cards import Card
    from zoo.evaluation import Evaluation
    from zoo.publishing import Publication

__all__ = ["main"]

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


_RECOVERY = {"tasks": [8, 32, 128], "seeds": [1, 2, 3, 4, 5]}
"""What `zoo recovery` trains for when nothing else is asked for."""


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, with the nearest command or option."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice" in message and self._subparsers is not None:
            given = message.partition("'")[2].partition("'")[0]
            message = f"no command {given!r}.{nearest(given, _commands(self))}"
        print(f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def _commands(parser: argparse.ArgumentParser) -> dict[str, _Parser]:
    """Parsers of the subcommands by name."""
    return {
        name: sub
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, sub in action.choices.items()
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """As `parse_args`, but lists may come in parts, before and after options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    parser = _commands(parser).get(options.command or "", parser)
    listed = _list_of(parser, options)
    for word in rest:
        if word.startswith("-"):
            known = list(parser._option_string_actions)
            parser.error(f"no option {word!r}.{nearest(word.partition('=')[0], known)}")
        if listed is None:
            parser.error(f"unexpected argument {word!r}")
        listed.append(word)
    return options


def _list_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str] | None:
    """What a word without an option belongs to; None where there is nothing, or no telling."""
    several = [action for action in parser._actions if action.nargs in ("*", "+")]
    several = [action for action in several if not action.option_strings] or several
    listed = getattr(options, several[0].dest) if len(several) == 1 else None
    return listed if isinstance(listed, list) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after `zoo`; None: those of this process.

    Returns:
        The exit status.
    """
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except ZooError as error:
        return _fail(str(error), BAD_INPUT)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted{error.args[0] if error.args else ''}", INTERRUPTED)
    except BrokenPipeError:
        # The reader has left (zoo list | head); nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        return _fail(f"{error.strerror or error}{where}", BAD_INPUT)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = _parse(arguments)
    except SystemExit as leave:  # argparse has shown its help, or what is wrong
        return OK if leave.code is None else int(leave.code)
    status: int = options.run(options)
    return status


def _fail(message: str, status: int) -> int:
    print(f"zoo: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> _Parser:
    parser = _Parser(prog="zoo", description="A model zoo in which every number can be checked.")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.set_defaults(run=_version, command=None)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> _Parser:
        sub: _Parser = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.set_defaults(run=run, command=name)
        return sub

    sub = command("list", _list, "list the models")
    sub.add_argument("include", nargs="*", metavar="pattern", help="shell wildcards on names")
    sub.add_argument("--exclude", metavar="PATTERN", action="append", help="names to leave out")
    sub.add_argument("--task", help="as language-modeling")
    sub.add_argument("--family", help="as cached-transformers")
    sub.add_argument("--licence", help="of the weights, as apache-2.0")
    sub.add_argument("--max-params", metavar="N", type=int, help="largest number of parameters")

    sub = command("info", _info, "show the card of a model")
    sub.add_argument("name")

    sub = command("load-check", _load_check, "load a model and say which tensors were loaded")
    sub.add_argument("name")

    sub = command("predict", _predict, "score texts, or name the class of texts or pictures")
    sub.add_argument("name")
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="a text; may be repeated")
    source.add_argument("--file", action="append", help="a text file; may be repeated")
    source.add_argument("--image", nargs="+", metavar="FILE", help="pictures")
    sub.add_argument("--top-k", type=int, help="classes to name of each (5)")

    sub = command("generate", _generate, "continue a text")
    sub.add_argument("name")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--max-new-tokens", type=int, default=300, help="bytes to write (300)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (0.8)")
    sub.add_argument("--top-k", type=int, help="choose among the k likeliest bytes")
    sub.add_argument("--top-p", type=float, help="among the likeliest that reach p together")
    sub.add_argument("--seed", type=_seed, help="makes the text repeatable")

    sub = command("recommend", _recommend, "list what a user, or someone new, may like")
    sub.add_argument("name")
    who = sub.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="id of a user that the model was trained on")
    who.add_argument("--liked", action="append", help="a title or id; may be repeated")
    sub.add_argument("--k", type=int, default=10, help="length of the list (10)")
    sub.add_argument("--include-seen", action="store_true", help="list what the user has rated too")

    sub = command("evaluate", _evaluate, "measure a model and compare with its recorded numbers")
    sub.add_argument("name", help="a weight or a checkpoint folder")
    sub.add_argument("--data-dir", help="folder to look for the data in first")
    sub.add_argument("--protocol", action="append", help="only this one; may be repeated")
    sub.add_argument("--record", action="store_true", help="write the results into the folder")
    sub.add_argument(
        "--run", dest="run_folder", help="with --record: run folder that the weight comes from"
    )
    sub.add_argument("--diagnose", action="store_true", help="also figures on robustness")
    sub.add_argument("--commit", help="with --record: commit that trained it, if the run lacks it")
    sub.add_argument(
        "--analog",
        nargs="+",
        metavar="KEY=VALUES",
        help="measure a classifier with quantised, noisy activations and weights instead: "
        "bits=4,6,8 noise=0.2,0.5 repeats=3 seed=0 scale=calibrated; scale=unit needs no training "
        "images, and cuts values off at 1; images=1000 measures on so many",
    )
    sub.add_argument(
        "--beside", action="append", metavar="NAME", help="with --analog: another classifier"
    )
    sub.add_argument("--figures", metavar="FOLDER", help="with --analog: draw what was measured")

    sub = command("reproduce", _reproduce, "train from the recipe and compare with the record")
    _add_run_options(sub, "name")
    sub.add_argument("--data-dir", help="folder to look for the data in first")
    sub.add_argument("--record", metavar="FOLDER", help="write it into this checkpoint folder")

    sub = command("fit", _fit, "train from a recipe")
    _add_run_options(sub, "recipe")

    sub = command("finetune", _finetune, "fine-tune a model on data of your own")
    sub.add_argument("name", help="a weight, a checkpoint folder, or owner/name on the Hub")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    sub.add_argument(
        "--data",
        required=True,
        help="a folder of class folders, a CSV of ratings, or a text file",
    )
    sub.add_argument("--epochs", type=int, default=3, help="passes over the data (3)")
    sub.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (0.001)")
    sub.add_argument(
        "--freeze",
        action="append",
        metavar="PART",
        help="encoder, or names with shell wildcards; may be repeated",
    )
    sub.add_argument("--layer-decay", type=float, help="of the learning rate, per group of layers")
    sub.add_argument("--adapters", choices=["lora", "lora-fa"], help="train these alone")
    sub.add_argument("--rank", type=int, help="of the adapters (8)")
    sub.add_argument("--alpha", type=float, help="scales the adapters by alpha / rank")
    sub.add_argument(
        "--target", action="append", metavar="LAYER", help="that gets one; may be repeated"
    )
    sub.add_argument(
        "--no-save-memory",
        dest="save_memory",
        action="store_false",
        help="let PyTorch keep what it keeps, also what no backward pass needs",
    )
    sub.add_argument(
        "--recompute-blocks",
        action="store_true",
        help="keep the input of each block alone, for one more forward pass per step",
    )
    sub.add_argument("--num-classes", type=int, help="that the data must have")
    sub.add_argument("--seed", type=_seed, default=0, help="makes the result repeatable (0)")
    sub.add_argument("--out", help="run folder; one that was interrupted goes on")
    sub.add_argument("--weight-name", metavar="NAME", help="of the new weight, after the dot")
    sub.add_argument("--data-license", default="", help="for the card")
    sub.add_argument("--accelerator", help="of Lightning, as cpu or gpu")
    sub.add_argument("--devices", type=int, help="processes on each machine")
    sub.add_argument("--num-nodes", type=int, help="machines")
    sub.add_argument("--strategy", help="of Lightning, as ddp or fsdp")

    sub = command("controls", _controls, "train the controls of a weight and record them")
    sub.add_argument("name")
    sub.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="what to train with")
    sub.add_argument("--out", help="folder of the runs (runs/controls/NAME)")
    sub.add_argument("--only", nargs="+", metavar="RECIPE", help="train these alone, as relu")
    sub.add_argument("--record", metavar="FOLDER", help="write them into this checkpoint folder")
    sub.add_argument(
        "--card",
        metavar="FILE",
        help="of controls that belong to no weight: keep them beside this card, and write their "
        "table into it",
    )
    sub.add_argument("--figure", metavar="FILE", help="draw their loss curves into this PNG file")

    sub = command("recovery", _recovery, "train gates on synthetic tasks whose experts are known")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    sub.add_argument("--tasks", type=int, nargs="+", default=_RECOVERY["tasks"])
    sub.add_argument("--seeds", type=int, nargs="+", default=_RECOVERY["seeds"])
    sub.add_argument("--out", default="runs/recovery", help="folder of the runs")
    sub.add_argument("--figure", metavar="FILE", help="draw error and recovery into this file")
    sub.add_argument(
        "--readme",
        metavar="FILE",
        help="keep the outcome beside this README, in model_cards, and write its table",
    )

    sub = command("memory", _memory, "what is kept for the backward pass, by what is trained")
    sub.add_argument("names", nargs="*", metavar="NAME", help="networks of the table (all)")
    sub.add_argument("--readme", metavar="FILE", help="write the table into this README")

    sub = command("transfer", _transfer, "fine-tuning against training from scratch on few data")
    sub.add_argument(
        "name",
        help="of a worked example: austen, cifar100-to-fashion-mnist, cifar100-to-coarse, "
        "mnist-to-fashion-mnist, new-users, new-classes",
    )
    sub.add_argument("--base", help="another weight or a checkpoint folder")
    sub.add_argument("--amounts", type=int, nargs="+", help="of data, in the example's unit")
    sub.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    sub.add_argument("--steps", type=int, help="of every training, about")
    sub.add_argument("--out", help="folder of the runs (runs/transfer/NAME)")
    sub.add_argument("--data", help="file or folder to look for the data in first")
    sub.add_argument(
        "--readme", metavar="FILE", help="keep the outcome beside this README, in model_cards, and "
        "write its table"
    )  # fmt: skip

    sub = command("convert", _convert, "make a checkpoint folder of a training checkpoint")
    sub.add_argument("checkpoint", help="last.ckpt of a run folder")
    sub.add_argument("folder", help="checkpoint folder to write")
    sub.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")

    sub = command("push", _push, "publish a weight on the Hub")
    sub.add_argument("name", nargs="?", help="a bundled weight or a checkpoint folder")
    sub.add_argument("repo_id", nargs="?", help="owner/name (a weight's card says where)")
    sub.add_argument("--all", action="store_true", help="every weight of the zoo; goes on")
    sub.add_argument("--private", action="store_true", help="make the repository private")
    sub.add_argument("--dry-run", action="store_true", help="check everything, send nothing")
    sub.add_argument("--tag", help="of the commit (v1, v2 and so on)")
    sub.add_argument("--parent", metavar="COMMIT", help="build on this one, or publish nothing")

    sub = command("pull", _pull, "bring a weight into the cache, checked")
    sub.add_argument("name", help="a weight, owner/name or owner/name@revision")
    sub.add_argument("--revision", help="commit, tag or branch")

    sub = command("export", _export, "write a file that runs without this package, compared")
    sub.add_argument("name", help="a weight, a checkpoint folder, or owner/name")
    sub.add_argument("--format", default="torch-export", help="onnx or torch-export")
    sub.add_argument("--out", help="file to write (NAME.onnx or NAME.pt2)")
    sub.add_argument("--revision", help="commit, tag or branch on the Hub")

    sub = command("hub-sandbox", _hub_sandbox, "a Hub on this machine, to try publishing on")
    sub.add_argument("--port", type=int, default=0, help="0 takes a free one (0)")
    sub.add_argument(
        "--fault",
        action="append",
        metavar="KIND[:PATH]",
        help="strike one request whose path has these shell wildcards; may be repeated",
    )

    sub = command("card", _card, "show a card, or write its computable fields")
    sub.add_argument("name")
    sub.add_argument("--update", action="store_true", help="rewrite from the checkpoint folder")
    sub.add_argument(
        "--figures",
        metavar="RUN",
        nargs="?",
        const="",
        help="draw its figures, with curves of its training where the run folder is given",
    )
    sub.add_argument("--readme", metavar="FILE", help="write the table of models into this README")
    return parser


def _add_run_options(sub: argparse.ArgumentParser, what: str) -> None:
    sub.add_argument(what)
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    sub.add_argument("--out", help="run folder")
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted run")


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {value}")
    return value


_seed.__name__ = "int"  # what argparse calls it when the text is no number


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _printable(text: str) -> str:
    """The text, with a question mark for what standard output cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _one_line(text: str) -> str:
    """The text for a cell of a table: in one line, and without what would control a terminal.

    Names of classes, items and files come from others.
    """
    shown = (character if character.isprintable() else "?" for character in " ".join(text.split()))
    return _printable("".join(shown))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _version(options: argparse.Namespace) -> int:
    if options.version:
        from zoo import __version__

        print(__version__)
    else:
        _parser().print_help()
    return OK


def _list(options: argparse.Namespace) -> int:
    from zoo import cards

    names = cards.list_models(
        include=options.include or None,
        exclude=options.exclude,
        task=options.task,
        family=options.family,
        licence=options.licence,
        max_params=options.max_params,
    )
    if options.json:
        _print_json(names)
        return OK
    rows = []
    for name in names:
        card = cards.find(name)
        result = next((r for r in card.results if r.primary), None)
        shown = "" if result is None else f"{result.value:.4f} {result.metric} ({result.protocol})"
        rows.append([name, card.task, f"{card.parameters:,}", shown])
    _table(["name", "task", "parameters", "recorded"], rows)
    return OK


def _info(options: argparse.Namespace) -> int:
    from zoo import cards

    return _show_card(cards.find(options.name), options.json)


def _show_card(card: Card, as_json: bool) -> int:
    from zoo import cards
    from zoo.configs import to_json

    if as_json:
        _print_json({key: value for key, value in to_json(card).items() if key != "body"})
    else:
        print(_printable(cards.render(card)))
    return OK


def _load_check(options: argparse.Namespace) -> int:
    import zoo

    report = zoo.load(options.name).load_report
    shown = {
        "loaded": len(report.loaded),
        "dropped": list(report.dropped),
        "initialised": list(report.initialised),
    }
    if options.json:
        _print_json(shown)
    else:
        print(
            f"{options.name}: {shown['loaded']} tensors loaded, {len(report.dropped)} dropped, "
            f"{len(report.initialised)} initialised"
        )
    return OK


def _load_text_model(name: str) -> Any:
    import zoo
    from zoo.tasks.language_modeling import LanguageModel

    module = zoo.load(name)
    if not isinstance(module, LanguageModel):
        raise ZooError(f"{name} is no language model; see: zoo list --task language-modeling")
    return module


def _predict_texts(module: Any, options: argparse.Namespace) -> int:
    from zoo.data.text import read_text

    if options.top_k is not None:
        raise ZooError(f"{options.name} scores texts and names no classes; leave out --top-k.")
    # Surrogates stand for bytes that are not UTF-8, so that every byte of a file is scored.
    texts = options.text or [
        bytes(read_text(path).tolist()).decode("utf-8", "surrogateescape") for path in options.file
    ]
    scores = module.predict(texts)
    if options.json:
        _print_json(
            [
                {
                    "n": score.n,
                    "log_likelihood": score.log_likelihood,
                    "nats_per_byte": score.nats_per_byte,
                    "bits_per_byte": score.bits_per_byte,
                    "perplexity": score.perplexity,
                }
                for score in scores
            ]
        )
        return OK
    names = options.file or [text if len(text) <= 40 else text[:37] + "..." for text in texts]
    rows = [
        [
            _one_line(name),
            f"{score.n}",
            f"{score.log_likelihood:.2f}",
            f"{score.nats_per_byte:.4f}",
            f"{score.perplexity:.3f}",
        ]
        for name, score in zip(names, scores, strict=True)
    ]
    _table(["text", "bytes", "log-likelihood", "nats per byte", "perplexity"], rows)
    return OK


def _top_k(options: argparse.Namespace) -> int:
    return 5 if options.top_k is None else int(options.top_k)


def _predict_images(module: Any, options: argparse.Namespace) -> int:
    predictions = module.predict(options.image, top_k=_top_k(options))
    return _show_classes("image", "picture", options.image, predictions, options.json)


def _predict_topics(module: Any, options: argparse.Namespace) -> int:
    from zoo.data.text import decode_bytes, read_text

    texts = options.text or [decode_bytes(read_text(path)) for path in options.file]
    names = options.file or [text if len(text) <= 40 else text[:37] + "..." for text in texts]
    predictions = module.predict(texts, top_k=_top_k(options))
    return _show_classes("text", "text", names, predictions, options.json)


def _show_classes(
    key: str, title: str, names: list[str], predictions: list[Any], as_json: bool
) -> int:
    """Classes and probabilities of each of the inputs, which are called by their names."""
    if as_json:
        _print_json(
            [
                {
                    key: name,
                    "classes": list(prediction.classes),
                    "probabilities": list(prediction.probabilities),
                }
                for name, prediction in zip(names, predictions, strict=True)
            ]
        )
        return OK
    rows = [
        [_one_line(name), _one_line(label), f"{probability:.4f}"]
        for name, prediction in zip(names, predictions, strict=True)
        for label, probability in zip(prediction.classes, prediction.probabilities, strict=True)
    ]
    _table([title, "class", "probability"], rows)
    return OK


_PREDICTORS: dict[str, tuple[tuple[str, ...], Callable[[Any, argparse.Namespace], int]]] = {
    "image-classification": (("image",), _predict_images),
    "language-modeling": (("text", "file"), _predict_texts),
    "online-learning": (("image",), _predict_images),
    "online-text-learning": (("text", "file"), _predict_topics),
}
"""Task -> options that its input comes by, and what shows its predictions."""


def _predict(options: argparse.Namespace) -> int:
    import zoo
    from zoo.registry import architecture_of

    module = zoo.load(options.name)
    task = architecture_of(type(module)).task
    if task not in _PREDICTORS:
        raise ZooError(f"{options.name} is for {task}, which zoo predict has no input for.")
    names, show = _PREDICTORS[task]
    if not any(getattr(options, name) for name in names):
        raise ZooError(
            f"{options.name} is for {task}; it takes {' or '.join(f'--{name}' for name in names)}."
        )
    return show(module, options)


def _generate(options: argparse.Namespace) -> int:
    stream = _load_text_model(options.name).stream(
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    if options.json:
        _print_json({"prompt": options.prompt, "text": "".join(stream)})
        return OK
    print(_printable(options.prompt), end="", flush=True)
    for piece in stream:
        print(_printable(piece), end="", flush=True)
    print()
    return OK


def _recommend(options: argparse.Namespace) -> int:
    import zoo
    from zoo.tasks.recommendation import Recommender

    module = zoo.load(options.name)
    if not isinstance(module, Recommender):
        raise ZooError(f"{options.name} is no recommender; see: zoo list --task recommendation")
    try:
        found = module.recommend(
            options.user, options.k, liked=options.liked, exclude_seen=not options.include_seen
        )
    except DataError:
        if options.user is None or module.ratings is not None:
            raise
        dataset = module.catalogue.dataset
        raise DataError(
            "What users have rated is not part of a checkpoint: "
            f"{f'put {dataset} into $ZOO_DATA_DIR, or ' if dataset else ''}add --include-seen, and "
            "it is not left out."
        ) from None
    if options.json:
        from zoo.configs import to_json

        _print_json([to_json(entry) for entry in found])
        return OK
    rows = [
        [
            _one_line(entry.item),
            _one_line(entry.title),
            f"{entry.score:.4f}",
            "-" if entry.rating is None else f"{entry.rating:.2f}",
        ]
        for entry in found
    ]
    _table(["item", "title", "score", "expected rating"], rows)
    return OK


def _show(evaluation: Evaluation, as_json: bool) -> int:
    rows, document = [], []
    for o in evaluation.outcomes:
        low, high = o.interval
        recorded = None if o.recorded is None else o.recorded.value
        rows.append(
            [
                o.protocol,
                o.metric,
                f"{o.value:.5f}",
                f"{low:.4f} to {high:.4f}",
                f"{o.n:,}",
                "-" if recorded is None else f"{recorded:.5f}",
                "-" if o.tolerance is None else f"{o.tolerance:.5f}",
                o.verdict,
            ]
        )
        document.append(
            {
                "protocol": o.protocol,
                "metric": o.metric,
                "unit": o.unit,
                "value": o.value,
                "interval": list(o.interval),
                "interval_method": o.interval_method,
                "n": o.n,
                "recorded": recorded,
                "tolerance": o.tolerance,
                "passed": o.passed,
                **({"indistinct": list(o.indistinct)} if o.indistinct else {}),
            }
        )
    if as_json:
        shown = {"name": evaluation.name, "passed": evaluation.passed, "outcomes": document}
        if evaluation.missing:
            shown["missing"] = list(evaluation.missing)
        if evaluation.diagnostics is not None:
            shown["diagnostics"] = evaluation.diagnostics
        _print_json(shown)
    else:
        header = ["protocol", "metric", "value", "95 % interval", "n"]
        _table([*header, "recorded", "tolerance", "verdict"], rows)
        if evaluation.diagnostics is not None:
            for key, value in evaluation.diagnostics.items():
                print(f"{key}:")
                for line in value if isinstance(value, list) else [value]:
                    print(f"  {json.dumps(line)}")
        for o in evaluation.outcomes:
            if o.indistinct:
                print(
                    f"{o.protocol}: a tolerance of {o.tolerance:.5f} cannot tell the model from "
                    f"{', '.join(o.indistinct)}."
                )
        print(f"{evaluation.name}: {evaluation.verdict}")
    return OK if evaluation.passed else FAILED


def _analog(options: argparse.Namespace) -> int:
    from zoo import analog

    settings = analog.parse_settings(options.analog)
    names = [options.name, *(options.beside or [])]
    if options.record:
        from zoo import evaluation

        evaluation.recorded(options.name)
    if options.figures:
        from zoo import figures

        figures.prepare(Path(options.figures))
    sweeps = analog.sweeps(names, settings, options.data_dir)
    if options.json:
        from zoo.configs import to_json

        _print_json([to_json(one) for one in sweeps])
    else:
        header = ["model", "bits", "noise", "accuracy", "spread", "digital", "images"]
        _table(header, analog.rows(sweeps))
    if options.record:
        analog.record(sweeps, settings, options.name)
    if options.figures:
        sys.stdout.flush()  # what was measured is out, whatever becomes of the figures
        for path in figures.draw_analog(sweeps, Path(options.figures)):
            print(f"Drew {path}", file=sys.stderr)
    return OK


def _evaluate(options: argparse.Namespace) -> int:
    from zoo import evaluation

    of_a_record = {"--run": options.run_folder, "--commit": options.commit}
    if options.analog:
        others = {"--protocol": options.protocol, "--diagnose": options.diagnose}
        _refuse({**others, **of_a_record}, "--analog")
        return _analog(options)
    if options.beside or options.figures:
        raise ZooError("--beside and --figures go with --analog.")
    if not options.record:
        if any(value is not None for value in of_a_record.values()):
            raise ZooError("--run and --commit go with --record.")
        result = evaluation.evaluate(
            options.name,
            options.data_dir,
            protocols=options.protocol,
            diagnose=options.diagnose,
        )
        return _show(result, options.json)
    # A record of some protocols would leave the others without one.
    _refuse({"--protocol": options.protocol}, "--record")
    result = evaluation.record(
        options.name,
        data_dir=options.data_dir,
        run=options.run_folder,
        commit=options.commit,
        diagnose=options.diagnose,
    )
    return _show(result, options.json)


def _refuse(given: dict[str, Any], beside: str) -> None:
    """Refuse options that would do nothing, with their values by name."""
    for name, value in given.items():
        if value not in (None, False):
            raise ZooError(f"{name} does not go with {beside}.")


def _chatter() -> contextlib.AbstractContextManager[Any]:
    """Sends what Lightning prints to standard error; standard output is for results."""
    return contextlib.redirect_stdout(sys.stderr)


def _reproduce(options: argparse.Namespace) -> int:
    from zoo import evaluation

    with _chatter():
        result = evaluation.reproduce(
            options.name,
            out=options.out,
            overrides=options.overrides,
            resume=options.resume,
            data_dir=options.data_dir,
            record=options.record,
        )
    return _show(result, options.json)


def _fit(options: argparse.Namespace) -> int:
    from zoo import training

    with _chatter():
        run = training.fit(
            options.recipe, options.overrides, out=options.out, resume=options.resume
        )
    if options.json:
        _print_json(
            {
                "checkpoint": str(run.checkpoint),
                "cpu_minutes": run.cpu_minutes,
                "wall_minutes": run.wall_minutes,
            }
        )
    else:
        print(
            f"Trained in {run.wall_minutes:.1f} min ({run.cpu_minutes:.1f} CPU min). "
            f"Checkpoint folder: {run.checkpoint}"
        )
    return OK


def _finetune(options: argparse.Namespace) -> int:
    from zoo import finetuning

    freeze = options.freeze
    with _chatter():
        module = finetuning.finetune(
            options.name,
            options.data,
            epochs=options.epochs,
            lr=options.lr,
            freeze=freeze[0] if freeze and len(freeze) == 1 else freeze,
            layer_decay=options.layer_decay,
            adapters=options.adapters,
            rank=options.rank,
            alpha=options.alpha,
            target=options.target,
            save_memory=options.save_memory,
            recompute_blocks=options.recompute_blocks,
            num_classes=options.num_classes,
            seed=options.seed,
            out=options.out,
            name=options.weight_name,
            data_license=options.data_license,
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=options.strategy,
            overrides=options.overrides,
        )
    done = module.finetuned
    if done is None:
        return OK  # one of several processes, and not the first
    if options.json:
        from zoo.configs import to_json

        measured = {name: [to_json(o) for o in getattr(done, name)] for name in ("before", "after")}
        _print_json({"checkpoint": str(done.checkpoint), **measured})
        return OK
    _table(["protocol", "metric", "n", "before", "after"], finetuning.rows(done))
    print(f"Checkpoint folder: {done.checkpoint}")
    return OK


def _controls(options: argparse.Namespace) -> int:
    from zoo import cards, controls

    task = cards.find(options.name).task if options.figure else ""  # refused before anything else
    if options.record:
        controls.check_recordable(options.name, options.record, out=options.out, only=options.only)
    if options.card:
        controls.check_keepable(options.name, options.card)
    with _chatter():
        arms = controls.run(
            options.name,
            seeds=options.seeds,
            out=options.out,
            only=options.only,
            speeds=bool(options.record or options.card or options.json),
        )
    if options.record:
        controls.record(arms, options.record)
    if options.card:
        given = {"seeds": options.seeds, "only": options.only}
        command = " ".join(_command("controls", given, options.name))
        controls.keep(options.name, arms, options.card, command)
    if options.figure:
        from zoo import figures

        runs = controls.finished_runs(options.name, options.out)
        figures.draw_controls(runs, figures.loss_unit(task), Path(options.figure))
    if options.json:
        from zoo.configs import to_json

        _print_json([to_json(arm) for arm in arms])
        return OK
    from zoo._card_tables import difference

    rows = [
        [
            arm.name,
            f"{arm.parameters:,}",
            arm.result.protocol,
            f"{arm.result.value:.4f}",
            "-" if arm.result.seed_spread is None else f"{arm.result.seed_spread:.4f}",
            difference(arm, arms),
            *([arm.speed] if options.record else []),
        ]
        for arm in arms
    ]
    columns = ["control", "parameters", "protocol", "value", "seed spread", "difference"]
    _table([*columns, "speed"] if options.record else columns, rows)
    return OK


def _command(verb: str, given: Mapping[str, Sequence[object] | None], *arguments: str) -> list[str]:
    """The words that a command was given, less what was left out."""
    words = ["zoo", verb, *arguments]
    for option, values in given.items():
        words += [] if values is None else [f"--{option}", *map(str, values)]
    return words


def _recovery(options: argparse.Namespace) -> int:
    from zoo import recovery

    with _chatter():
        arms = recovery.run(
            options.tasks, seeds=options.seeds, out=options.out, overrides=options.overrides
        )
    asked = {"tasks": options.tasks, "seeds": options.seeds}
    given = {key: None if asked[key] == usual else asked[key] for key, usual in _RECOVERY.items()}
    command = " ".join(_command("recovery", given, *options.overrides))
    path = Path(options.out) / "recovery.json"
    recovery.write(arms, path, command)
    if options.figure:
        recovery.draw(arms, options.figure)
    if options.readme:
        recovery.update_readme(Path(options.readme), path)
    if options.json:
        from zoo.configs import to_json

        _print_json([to_json(arm) for arm in arms])
        return OK
    _table(recovery.HEADER, recovery.rows(arms))
    return OK


def _memory(options: argparse.Namespace) -> int:
    from zoo import memory_table
    from zoo.progress import track

    total = len(options.names or memory_table.NETWORKS) * len(memory_table.POLICIES)
    measured = list(track(memory_table.measure(options.names), "Measuring", total))
    if options.readme:
        memory_table.update_readme(Path(options.readme), measured)
    if options.json:
        from zoo.configs import to_json

        _print_json([{**to_json(row), "ratio": row.ratio} for row in measured])
    else:
        _table(*memory_table.rows(measured))
    return OK


def _transfer(options: argparse.Namespace) -> int:
    from zoo import transfer

    if options.readme and (options.base or options.data):
        raise ZooError(
            "--readme keeps what came of the package's own weight and data; leave out --base and "
            "--data, or --readme."
        )
    out = options.out or Path("runs") / "transfer" / options.name
    with _chatter():
        points = transfer.run(
            options.name,
            base=options.base,
            amounts=options.amounts,
            seeds=options.seeds,
            steps=options.steps,
            out=out,
            data=options.data,
        )
    given = {
        "amounts": options.amounts,
        "seeds": options.seeds if options.seeds != [1, 2, 3] else None,
        "steps": None if options.steps is None else [options.steps],
    }
    command = " ".join(_command("transfer", given, options.name))
    transfer.write(options.name, points, out, options.base, command)
    if options.readme:
        transfer.update_readme(Path(options.readme), Path(out))
    if options.json:
        from zoo.configs import to_json

        _print_json([to_json(point) for point in points])
        return OK
    _table(transfer.HEADER, transfer.rows(points))
    return OK


def _convert(options: argparse.Namespace) -> int:
    from zoo import checkpoints

    checkpoints.convert(options.checkpoint, options.folder, dtype=options.dtype)
    if options.json:
        _print_json({"folder": options.folder})
    else:
        print(f"Wrote {options.folder}")
    return OK


def _push(options: argparse.Namespace) -> int:
    from zoo import publishing
    from zoo.configs import to_json

    if options.all == (options.name is not None):
        raise ZooError("Say what to publish: a weight, a checkpoint folder, or --all.")
    if options.all:
        if options.tag or options.parent:
            raise ZooError("--tag and --parent are for one weight, not for --all.")
        done = publishing.push_all(private=options.private, dry_run=options.dry_run)
    else:
        done = [
            publishing.push(
                options.name,
                options.repo_id,
                private=options.private,
                dry_run=options.dry_run,
                tag=options.tag,
                parent=options.parent,
            )
        ]
    if options.json:
        _print_json([to_json(publication) for publication in done])
    else:
        rows = [[p.name, p.repo_id, p.commit or "-", p.tag or "-", _done(p)] for p in done]
        _table(["name", "repository", "commit", "tag", "what happened"], rows)
    return FAILED if any(publication.error for publication in done) else OK


def _done(publication: Publication) -> str:
    if publication.error:
        return publication.error
    if publication.commit is None:
        return f"would send {', '.join(publication.sent)} ({publication.size / 1e6:.1f} MB)"
    changed = [*publication.sent, *(f"-{name}" for name in publication.removed)]
    return f"sent {', '.join(changed)}" if changed else "was there already"


def _pull(options: argparse.Namespace) -> int:
    from zoo import hub
    from zoo.files import CONFIG_FILE, WEIGHTS_FILE

    with _log_shown():
        folder, card = hub.resolve(options.name, options.revision)
    needed = (CONFIG_FILE, WEIGHTS_FILE)
    # A path of this machine is handed on as it is; what it lacks shows when it is loaded.
    if card is None and not all((folder / name).is_file() for name in needed):
        raise ZooError(f"{folder} is no checkpoint folder: it needs {' and '.join(needed)}.")
    if options.json:
        _print_json({"folder": str(folder), "name": None if card is None else card.name})
    else:
        print(folder)
    return OK


def _export(options: argparse.Namespace) -> int:
    from zoo import exporting

    with _chatter():
        done = exporting.export(
            options.name, options.out, format=options.format, revision=options.revision
        )
    if options.json:
        shown = {"path": str(done.path), "inputs": done.inputs, "outputs": done.outputs}
        _print_json({**shown, "format": done.format, "difference": done.difference})
    else:
        inputs = ", ".join(f"{name} B x {shape}" for name, shape in done.inputs.items())
        print(f"{done.path}: {inputs} -> {', '.join(done.outputs)}")
        print(f"largest difference from the model on random input: {done.difference:.1e}")
    return OK


@contextlib.contextmanager
def _log_shown() -> Iterator[None]:
    """Shows the log of the zoo on standard error."""
    import logging

    logger, handler = logging.getLogger("zoo"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _hub_sandbox(options: argparse.Namespace) -> int:
    from zoo.sandbox import FAULTS, Fault, Sandbox, serve

    try:
        sandbox = Sandbox(port=options.port)
    except (OSError, OverflowError) as error:
        raise ZooError(f"Port {options.port} cannot be used: {error}") from None
    for text in options.fault or ():
        kind, _, path = text.partition(":")
        if kind not in FAULTS:
            hint = nearest(kind, FAULTS) or f" There are: {', '.join(FAULTS)}."
            raise ZooError(f"Unknown fault {kind!r}.{hint}")
        sandbox.faults.append(Fault(kind, path=path or "*", method="*"))
    shown = {
        "HF_ENDPOINT": sandbox.url,
        "HF_TOKEN": "sandbox",
        "HF_HUB_DISABLE_XET": "1",
    }
    if options.json:
        _print_json(shown)
    else:
        print("\n".join(f"export {name}={value}" for name, value in shown.items()), flush=True)
        print(
            "A Hub in memory; stop it with Ctrl-C. In another terminal, with the lines above:\n"
            "  zoo push NAME sandbox/my-model && zoo pull sandbox/my-model",
            file=sys.stderr,
        )
    sys.stdout.flush()
    serve(sandbox)
    return OK


def _card(options: argparse.Namespace) -> int:
    from zoo import cards

    # First, since what is drawn is checked by the card, which knows no new files before.
    card = cards.update(options.name) if options.update else cards.find(options.name)
    if options.figures is not None:
        from zoo import figures

        for path in figures.draw(card, options.figures or None):
            print(f"Drew {path}", file=sys.stderr)
    if options.readme:
        cards.update_readme(Path(options.readme))
    return _show_card(card, options.json)


if __name__ == "__main__":
    sys.exit(main())
