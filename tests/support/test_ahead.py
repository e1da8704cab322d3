"""Loading ahead."""

from senet.support.ahead import load_ahead


def test_loading_ahead_keeps_the_order() -> None:
    loaded: list[int] = []

    def load(item: int) -> int:
        loaded.append(item)
        return 10 * item

    batches = load_ahead(range(11), load, 3)
    assert next(batches) == [0, 10, 20]
    assert list(batches) == [[30, 40, 50], [60, 70, 80], [90, 100]]
    assert sorted(loaded) == list(range(11))
    assert list(load_ahead([], load, 3)) == []
