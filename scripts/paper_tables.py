"""Write docs/paper.md: the paper's numbers beside ours, from models/cards.toml."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from senet.models.cards import Card, cards

PAGE = Path(__file__).parents[1] / "docs" / "paper.md"
HEADER = (
    "| network | errors, top-1 / top-5 % (data, source) | parameters, M: paper | ours "
    "| multiply-adds, G: paper | ours |\n|---|---|---|---|---|---|\n"
)


def text() -> str:
    """The page."""
    ablations = [card for name, card in cards().items() if name.startswith("table ")]
    networks = [card for name, card in cards().items() if not name.startswith("table ")]
    return (
        "# The paper's tables\n\n"
        "Networks and ablations of [arXiv 1709.01507](https://arxiv.org/abs/1709.01507), what was "
        "published and what we count of our networks (`senet.create_model(NAME)`). **Errors are "
        "those of the paper**, or of the weights that its authors released: nothing here was "
        "trained on ImageNet by us. Ours are parameters without running statistics, and "
        "multiply-adds of convolutions and matrix products; the paper also counts running "
        "statistics and some additions (`senet models --table` shows both counted its way). The "
        "tests recount every number (`tests/models/test_cards.py`). Written by "
        "`python scripts/paper_tables.py`.\n\n"
        "`senet ablate reduction|squeeze|excitation|stages|integration|nosqueeze` trains tables 10 "
        "to 16 on your data; [small runs are recorded](results.md#the-papers-ablations-tiny).\n\n"
        f"## Networks\n\n{_table(networks)}\n## Ablations (tables 10 to 16)\n\n{_table(ablations)}"
        f"\n## Where ours differ, and what was chosen\n\n{_notes(cards().values())}"
    )


def _table(chosen: Iterable[Card]) -> str:
    return HEADER + "".join(map(_row, chosen))


def _row(card: Card) -> str:
    errors = "<br>".join(
        f"{result.top1:.2f}"
        + (
            f"\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}{result.top5:.2f}"
            if result.top5 is not None
            else ""
        )
        + f" ({result.data}, {result.source})".replace(" ", "\N{NO-BREAK SPACE}")
        for result in card.results
    )
    cells = (
        card.name,
        errors,
        card.paper_parameters or "",
        f"{card.parameters / 1e6:.2f}",
        card.paper_gflops or "",
        f"{card.multiply_adds / 1e9:.3f}",
    )
    return f"| {' | '.join(cells)} |\n"


def _notes(chosen: Iterable[Card]) -> str:
    return "".join(
        f"- **{card.name}**: {' '.join(filter(None, (card.why, card.note)))}\n"
        for card in chosen
        if card.why or card.note
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(text(), encoding="utf-8")
