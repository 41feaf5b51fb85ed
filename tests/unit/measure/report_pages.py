"""What tests of reports share: a reader of their HTML, hostile text, reports and records of a GPU."""

from html.parser import HTMLParser

from deploy_sparse.measure.compare import compare_all
from deploy_sparse.measure.record_conditions import GpuConditions, GpuState
from deploy_sparse.measure.report import Report
from deploy_sparse.measure.timing import summarise

NASTY = "<script>alert('x')</script> | \"&_"


class Page(HTMLParser):
    """Checks that tags close in order, and collects headings, text, table cells by row and every tag's attributes."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, source):
        super().__init__()
        self.open, self.headings, self.rows, self.tags, self.text = [], [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag == "td" or (tag == "th" and ("scope", "row") in attrs):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h1"):
            self.headings.append(data)
        if "tbody" in self.open and self.rows[-1]:
            self.rows[-1][-1] += data.removesuffix("\n")
        if "style" not in self.open:
            self.text.append(data)


def report_of(records, **changes):
    return Report("A suite", tuple(records), compare_all(records), **changes)


def gpu_record(make_record, subject, ms, **changes):
    """A record of a GPU at 1900 MHz whose own clock shows half the host's time; ``how`` are further conditions."""
    state = GpuState(sm_mhz=1900, power_w=300.0, temperature_c=50)
    gpu = GpuConditions(
        name="NVIDIA H200", driver="580.1", power_limit_w=700.0, sm_max_mhz=1980, before=state,
        after=state.model_copy(update={"power_w": 640.4}), sm_mhz=(1755, 1980), held_by=("power cap",),
    )  # fmt: skip
    how = {"gpu": gpu, "interleaved_with": ("dense", "ticket"), **changes.pop("how", {})}
    conditions = make_record().conditions.model_copy(update=how)
    record = make_record(subject, ms=ms, target="h200-fp16", runtime="tensorrt", conditions=conditions, **changes)
    blocks = tuple(tuple(0.5 * sample for sample in block) for block in record.samples_ms)
    device = {"device_samples_ms": blocks, "device_stats": summarise([s for block in blocks for s in block])}
    return type(record)(**{**record.model_dump(exclude={"conditions"}), "conditions": conditions, **device})
