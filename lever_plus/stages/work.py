"""How many prompts each step asks of the LVLM, in one place: for dry runs, the experiments' prices and the doctor."""

from dataclasses import dataclass

from lever_plus.data import methods as methods_table
from lever_plus.infoscore import prompts_per_query
from lever_plus.settings.data import BeamSettings, RlDataSettings
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.selector import OnlineSettings


@dataclass(frozen=True)
class Work:
    """Prompts of a step for one query: ``by_shots`` {demonstrations: prompts}; each distinct prompt counts once.

    ``what``: the step's name; ``queries``: how many are asked for (-1: all); ``split``: where they come from;
    ``setting``: the variable that says how many; ``generates``: an answer is generated for each prompt.
    """

    what: str
    queries: int
    by_shots: dict[int, int]
    split: str
    setting: str
    generates: bool

    @property
    def per_query(self) -> int:
        """Prompts of one query."""
        return sum(self.by_shots.values())

    @property
    def images(self) -> int:
        """Images in the prompts of one query."""
        return sum((shots + 1) * count for shots, count in self.by_shots.items())

    def capped(self, there: int) -> int:
        """The queries there are, where more or all are asked for."""
        return there if self.queries < 0 else min(self.queries, there)


def beam_data(settings: BeamSettings) -> Work:
    """The InfoScore beam search."""
    by_shots, before = {0: 1}, 1
    for shots in range(1, settings.max_shot + 1):
        so_far = prompts_per_query(settings.candidate_num, settings.beam_size, shots)
        by_shots[shots], before = so_far - before, so_far
    return Work("beam data", settings.sample_num, by_shots, "train", "SAMPLE_NUM", False)


def rl_data(settings: RlDataSettings) -> Work:
    """RL data: at most these (equal pointers are one); generation and scores of a pointer share its prompt."""
    pointers = settings.rl_beams + settings.rl_samples_low + settings.rl_samples_high + settings.rl_random
    lengths = range(1, settings.rl_shot + 1) if settings.stop or settings.rl_prefixes else [settings.rl_shot]
    by_shots = {0: 1, **dict.fromkeys(lengths, pointers)}
    if settings.rl_balance > 1:  # first picks of all that are probed, for each one kept
        by_shots[0] = settings.rl_balance
        by_shots[1] = pointers * settings.rl_balance
    return Work("RL data", settings.rl_query_num, by_shots, "train", "RL_QUERY_NUM", True)


def online(settings: OnlineSettings) -> Work:
    """Fresh pointers of online GRPO, all rounds."""
    rounds = -(-settings.grpo_epochs // settings.online_epochs)
    by_shots = {settings.rl_shot: rounds * settings.online_samples}
    return Work("online GRPO", settings.rl_query_num, by_shots, "train", "RL_QUERY_NUM", True)


def training(settings: OnlineSettings) -> list[Work]:
    """What v3's training asks: fresh pointers (GRPO_MODE=online), picks on held-out queries."""
    steps = [online(settings)] if settings.is_online else []
    if settings.checkpoint_metric == "answers":
        epochs = settings.rce_epochs + settings.grpo_epochs
        phases = (settings.rce_epochs > 0) + (settings.grpo_epochs > 0)  # each begins with a look at its start
        asked = round(settings.rl_query_num * settings.val_fraction)
        by_shots = dict.fromkeys(range(1, settings.rl_shot + 1), epochs + phases)
        steps.append(Work("picks on held-out queries", asked, by_shots, "train", "RL_QUERY_NUM", True))
    return steps


def inference(settings: InferenceSettings, methods: list[str]) -> Work:
    """An evaluation of methods with 1 to MAX_EVAL_SHOT demonstrations."""
    # What decides how many asks what its fixed numbers ask, a cascade once more for their answers' probabilities; the
    # choice on held-out train queries has a line of its own.
    fixed = [method for method in methods if method != "zero_shot" and not methods_table.decides(method)]
    seeds = sum(settings.random_seeds if method == "random" else 1 for method in fixed)  # of each number of shots
    cascades = sum(method in methods_table.CASCADES for method in methods)
    by_shots = dict.fromkeys(range(1, settings.max_eval_shot + 1), seeds + cascades) if seeds else {}
    if "zero_shot" in methods:
        by_shots[0] = 1 + (cascades > 0)
    split = "val" if settings.eval_split == "val" else "train"
    return Work("inference", settings.test_data_num, by_shots, split, "TEST_DATA_NUM", True)
