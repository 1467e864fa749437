import pytest

from jaxcomp.report import Report, Row

ROWS = (
    Row(
        path="a",
        kind="dot",
        shape=(10, 20),
        format="int4 g128",
        nbits=900,
        error=0.125,
        seconds=1.5,
    ),
    Row(path="b", kind="gather", shape=(5, 2, 3), format="bfloat16", nbits=480, notes="kept"),
)
REPORT = Report(rows=ROWS, other_weights=7, other_nbits=7 * 32, original_nbits=237 * 32, seconds=2)


def test_totals_are_sums():
    assert REPORT.weights == 230
    assert REPORT.nbits == 900 + 480 + 224
    assert REPORT.nbytes == 201  # 1604 bits, rounded up.
    assert REPORT.bits_per_weight == pytest.approx(1380 / 230)
    assert REPORT.compression == pytest.approx(7584 / 1604)
    assert ROWS[0].bits_per_weight == 4.5


def test_json_and_back():
    assert Report.from_json(REPORT.to_json()) == REPORT
    assert Report.from_json(Report().to_json()) == Report()
    assert "\n" not in REPORT.to_json()


def test_text_has_every_row_and_the_totals():
    text = str(REPORT)
    for part in ("int4 g128", "4.50", "0.1250", "10x20", "gather", "kept", "6.00 bits a weight"):
        assert part in text


def test_times_can_be_left_out():
    report = REPORT.without_times()
    assert report.seconds is None and all(row.seconds is None for row in report.rows)
    assert report.rows[0].error == 0.125 and report.totals()["seconds"] is None
    assert report.nbits == REPORT.nbits
