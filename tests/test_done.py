"""A finished pipeline says so without starting a process for each step, and without torch."""

import subprocess
import sys

from lever_plus import config, pipeline
from lever_plus.stages import record, train_v3_online


def test_steps_that_are_done_are_not_started(monkeypatch, tmp_path, capsys):
    started, told = [], []
    done = {"lever_plus.stages.generate_data", record.__name__, train_v3_online.__name__}
    monkeypatch.setattr(pipeline, "is_done", lambda module, env: module in done)
    monkeypatch.setattr(pipeline.cli, "call", lambda command, env: started.append(command[-1]) or 0)
    monkeypatch.setattr(record, "tell", lambda settings: told.append(settings.dataset))
    jobs = [pipeline.Job(step, {}) for step in ("beam_data", "v2", "v3", "record")]
    env = {"DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path)}
    assert pipeline.run_jobs(jobs, env, {"prompts": 1, "training": 1, "": 1}, dry_run=False) == 0
    assert started == ["lever_plus.stages.train_v2"] and told == ["mini_okvqa"]
    said = capsys.readouterr().out
    for number, step, is_done in ((1, "beam_data", True), (2, "v2", False), (3, "v3", True), (4, "record", True)):
        assert (f"[{number}/4] {step}: done before" in said) is is_done


def test_what_is_wrong_with_an_input_is_left_to_the_step(tmp_path):
    env = {"DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path)}
    code = f"import sys; from lever_plus import pipeline as p; [p.is_done(m, {env}) for m, *_ in p.STEPS.values()]"
    code += "; sys.exit(bool({'torch', 'scipy.stats'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=config.REPO_ROOT, check=False).returncode == 0
    assert not any(pipeline.is_done(module, env) for module, *_ in pipeline.STEPS.values())
    assert not pipeline.all_done("inference", {**env, "METHODS": "none of these"})
