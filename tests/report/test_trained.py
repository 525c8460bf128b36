"""What real training writes is what a report reads."""

from graft.report.gather import gather

from ..train.small import small_plan, train


def test_a_trained_stage_has_its_curves_on_the_page(tmp_path):
    plan = small_plan(tmp_path)
    artifact = train(plan)
    report = gather(plan)
    (sft,) = report.trainings
    charts = {c.title: c.series for c in sft.charts}
    assert (sft.steps, sft.total_steps, sft.complete, sft.marks) == (artifact.counts["steps"], artifact.counts["steps"], True, ())
    assert {"Loss", "Learning rate", "Gradient norm", "Throughput", "Waiting for data"} <= set(charts)
    assert charts["Loss"][0].ys[-1] == artifact.counts["loss"] and charts["Loss"][1].ys[-1] == artifact.counts["validation_loss"]
    assert dict(sft.facts)["processes"] == "2" and report.cost.device_hours == artifact.counts["device_hours"] and not report.cost.gpu
