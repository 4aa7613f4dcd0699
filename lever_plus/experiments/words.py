"""What the numbers allow to be said, in Chinese and English (docs/evidence.md): functions of a record's entries."""

import re
import unicodedata
from typing import Any

from lever_plus.experiments import stats
from lever_plus.registries import RIVALS

LANGUAGES = ("zh", "en")
SEEDS_DOMINATE = 2.0  # a recipe's interval this many times as wide as the queries' is the seeds' doing
Sides = tuple[str, str]  # Chinese, English

TITLES: dict[str, Sides] = {
    "1": ("实验1：只使用 RCE（不进行 GRPO）", "Experiment 1: RCE only (no GRPO)"),
    "2": ("实验2：增加 RCE epochs", "Experiment 2: more RCE epochs"),
    "3": ("实验3：RCE + 少量 GRPO", "Experiment 3: RCE and a little GRPO"),
    "4a": ("实验4A：奖励只用 correctness", "Experiment 4A: reward from correctness alone"),
    "4b": ("实验4B：增加 beam_score 权重", "Experiment 4B: more weight on the beam score"),
    "5": ("实验5：检查训练数据质量", "Experiment 5: quality of the training data"),
}
METHODS: dict[str, Sides] = {
    "v3": ("v3（RL 选择器）", "v3 (RL selector)"),
    "v3_adaptive": ("v3 自行决定示例数", "v3 deciding how many"),
    "v3_best_fixed": ("v3 最佳固定示例数", "v3 with the best fixed number"),
    "v2": ("v2（监督选择器）", "v2 (supervised selector)"),
    "v1": ("v1（无 cross-attention 的监督选择器）", "v1 (supervised, no cross-attention)"),
    "v2_lora": ("v2_lora（CLIP 一起训练）", "v2_lora (CLIP trained, too)"),
    "random": ("随机示例", "random demonstrations"),
    "similarity": ("相似度 top-k", "similarity top-k"),
    "zero_shot": ("零样本（无示例）", "zero-shot (no demonstrations)"),
    "label": ("标签检索器（0 次 LVLM）", "label retriever (no LVLM prompts)"),
    "sim_clip_image": ("CLIP 图像相似度", "similarity of CLIP images"),
    "sim_clip_text": ("CLIP 问题相似度", "similarity of CLIP questions"),
    "sim_lvlm": ("LVLM 隐状态相似度", "similarity of LVLM states"),
    "rices": ("RICES（整个训练集）", "RICES (whole train split)"),
    "question_knn": ("问题 kNN（整个训练集）", "question kNN (whole train split)"),
    "mmices": ("MMICES（整个训练集）", "MMICES (whole train split)"),
    "bm25": ("BM25 问题（整个训练集）", "BM25 over questions (whole train split)"),
    "majority_vote_v3": ("v3 示例答案的多数票", "majority vote of v3's picks"),
    "majority_vote_v2": ("v2 示例答案的多数票", "majority vote of v2's picks"),
    "majority_vote_similarity": ("相似度示例答案的多数票", "majority vote of similar picks"),
    "v2_rival": ("同等代价的 v2", "v2 at equal price"),
    "oracle": ("oracle（试过的示例中最好的）", "oracle (best of all tried)"),
}
VALIDATION: dict[str, tuple[Sides, Sides]] = {
    "val_rce_loss": (
        ("Val loss", "Val loss"),
        ("留出查询上的 RCE loss，越低越好", "RCE loss on the held-out queries, lower is better"),
    ),
    "val_pairwise_accuracy": (
        ("Val 排序正确率", "Val ranking accuracy"),
        ("同一查询的两个 pointer 中，reward 高的概率也高的比例",
         "share of a query's pointer pairs that the policy orders as their rewards do"),
    ),
    "val_expected_reward": (
        ("Val 期望 reward", "Val expected reward"),
        ("reward 按策略在试过的 pointer 上的概率加权",
         "reward weighted by the policy's probabilities of the pointers tried"),
    ),
    "val_expected_accuracy": (
        ("Val 期望准确率", "Val expected accuracy"),
        ("VQA accuracy（0 到 1）按策略在试过的 pointer 上的概率加权",
         "VQA accuracy (0 to 1) weighted by the policy's probabilities of the pointers tried"),
    ),
    "val_answer_accuracy": (
        ("Val 自选示例准确率", "Val accuracy of own picks"),
        ("策略自己选的示例由 LVLM 作答的 VQA accuracy（0 到 1）",
         "VQA accuracy (0 to 1) of the LVLM's answers with the policy's own picks"),
    ),
    "val_greedy_regret": (
        ("Val 贪心遗憾", "Val greedy regret"),
        ("最好的 reward 减去贪心选择的；只算贪心选择被试过的查询",
         "best reward minus the greedy pick's, where the greedy pick was tried"),
    ),
    "val_greedy_scored": (
        ("Val 贪心选择被试过的查询数", "Val queries whose greedy pick was tried"),
        ("上一项的查询数", "the number of queries behind the regret"),
    ),
}  # fmt: skip
"""Validation numbers of the training log for readers: name and meaning; on the held-out part of the train split."""
PLAN_SETTINGS = (
    "RCE_EPOCHS", "GRPO_EPOCHS", "BATCH_SIZE", "RCE_LR", "GRPO_LR", "KL_BETA", "REWARD_ALPHA", "REWARD_BETA", "SEED",
)  # fmt: skip
"""Settings that the plan speaks of: a record lists them one by one, the others in one line."""
GRPO_SETTINGS = ("GRPO_LR", "KL_BETA", "KL_REF", "KL_ADAPTIVE", "GRPO_MODE", "ADVANTAGE_SCALE", "EPS_LOW", "EPS_HIGH")
"""Of no effect without GRPO."""
ARMS: dict[str, Sides] = {
    "1": ("实验1（只 RCE）", "experiment 1 (RCE alone)"),
    "2": ("实验2（更多 RCE epoch）", "experiment 2 (more RCE epochs)"),
    "3": ("实验3（RCE+GRPO）", "experiment 3 (RCE + GRPO)"),
    "4a": ("实验4A（只用 correctness）", "experiment 4A (correctness alone)"),
    "4b": ("实验4B（beam_score 权重更大）", "experiment 4B (more beam score)"),
}
GROUPS: dict[str, Sides] = {
    "seen": ("训练查询问过的概念（seen）", "seen: training queries ask about these concepts"),
    "known": ("模型本来就知道答案的查询（known）", "known: the LVLM knows the answer"),
    "unknown": ("模型不知道答案的查询（unknown）", "unknown: the LVLM does not know the answer"),
    "unseen": ("训练查询从未问过的概念（unseen）", "unseen: no training query asks about these concepts"),
}
REPORTED_EARLIER: dict[str, dict[str, list[float]]] = {
    "okvqa": {
        "v2": [56.7, 56.1, 55.5, 54.7],
        "v3, RCE 25 + GRPO 25": [57.3, 50.2, 48.3, 49.6],
        "v3, RCE 3 + GRPO 8": [51.6, 48.0, 47.2, 46.0],
    }
}
"""The plan's own numbers (200 OK-VQA queries, shots 1 to 4), by data set: shown beside measured ones, never mixed."""


def pick(sides: Sides, lang: str) -> str:
    """The side of a language."""
    return sides[LANGUAGES.index(lang)]


def title(experiment: str, lang: str) -> str:
    """The plan's title of an experiment name such as ``exp4a`` or ``exp1_seed2``; else the name itself."""
    found = re.match(r"exp(\d[ab]?)(?:_rce_epochs(\d+))?(?![0-9a-z])", experiment.lower())
    if found and found[1] in TITLES:
        epochs = pick((f"（{found[2]} 个 epoch）", f" ({found[2]} epochs)"), lang) if found[2] else ""
        return pick(TITLES[found[1]], lang) + epochs
    return pick((f"实验：{experiment}", f"Experiment: {experiment}"), lang)


def method(name: str, lang: str) -> str:
    """A method's or an arm's name for readers."""
    if name in METHODS:
        return pick(METHODS[name], lang)
    if RIVALS.file_of(name) is not None:
        return RIVALS.helps()[name]
    found = re.fullmatch(r"exp(\d[ab]?)(?:_rce_epochs(\d+))?", name)
    if found is None or found[1] not in ARMS:
        return name
    if found[2] is None:
        return pick(ARMS[found[1]], lang)
    return pick((f"实验{found[1]}（RCE {found[2]} 个 epoch）", f"experiment {found[1]} ({found[2]} RCE epochs)"), lang)


def group(name: str, lang: str) -> str:
    """A group of queries for readers; its own name where nothing more is known of it."""
    return pick(GROUPS[name], lang) if name in GROUPS else name


UPPER = ("oracle",)
"""Bounds that no method reaches: not in short tables."""


def short(name: str, lang: str) -> str:
    """A method's name without what stands in brackets."""
    return re.sub(r"\s*[（(].*[)）]$", "", method(name, lang))


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns, broken at blanks, or after wide characters."""
    lines, line = [], ""
    for piece in re.findall(r"[\u2e80-\uffef]|[^\s\u2e80-\uffef]+|\s+", text):
        if columns(line + piece.rstrip()) > width and line.strip() and piece not in "，。：；）、":
            lines.append(line.rstrip())
            line = "" if piece.isspace() else piece
        else:
            line += piece
    return [*lines, line.rstrip()] if line.strip() else lines


def validation(name: str, lang: str) -> str:
    """A validation number's name for readers."""
    return pick(VALIDATION[name][0], lang) if name in VALIDATION else name


def validation_meaning(name: str, lang: str) -> str:
    """What a validation number is; its name where that is not known."""
    return pick(VALIDATION[name][1], lang) if name in VALIDATION else name


_METRICS: tuple[tuple[str, str], ...] = (
    (r"official VQA accuracy \(10 answers, leave one out\)", "官方 VQA accuracy"),
    (r"exact match after the official normalisation \(1 answer\)", "官方归一化后的精确匹配（1 个答案）"),
    (r"min\(1, matches / (\d)\) \((\d+)(?: to (\d+))? answers\)", r"min(1, 匹配数 / \1)（\2 至 \3 个答案）"),
)


def is_official(text: str | None) -> bool:
    """Whether a record's accuracy is the official VQA accuracy of ten annotators."""
    return text is None or re.fullmatch(_METRICS[0][0], text) is not None


def metric(text: str | None, lang: str) -> str:
    """What a record's accuracy is (:func:`open_mmicl.metrics.vqa.metric_of`); None: of a record from before that was
    told, when it was always the official one.
    """
    if text is None or is_official(text):
        return pick(("官方 VQA accuracy", "the official VQA accuracy"), lang)
    if lang != "zh":
        return text
    parts = []
    for part in text.split("; "):
        found = next(((m, to) for pattern, to in _METRICS if (m := re.fullmatch(pattern, part))), None)
        parts.append(found[0].expand(found[1]).replace(" 至  个", " 个") if found else part)
    return "；".join(parts)


def metric_title(text: str | None, lang: str) -> str:
    """As :func:`metric`, where it begins a sentence."""
    said = metric(text, lang).removeprefix("the ")
    return said[:1].upper() + said[1:]


_WHYS: tuple[tuple[str, str], ...] = (
    (r"named by LEVER_LM_CHECKPOINT_PATH", "由 LEVER_LM_CHECKPOINT_PATH 指定"),
    (r"the only checkpoint there is", "只有这一个 checkpoint"),
    (r"the last epoch, (\w+) epoch (\d+): no train query was held out to compare checkpoints by",
     r"最后一个 epoch（\1 epoch \2）：没有留出训练查询，无法比较 checkpoint"),
    (r"best (\S+) on the held-out train queries: (\S+), (\w+) epoch (\d+)",
     r"训练集留出查询上 \1 最高（\2），\3 epoch \4"),
    (r"lowest val_loss recorded in (?:the )?(\d+)(?: (\w+))? checkpoints.*: (\S+)",
     r"\1 个 \2 checkpoint 中记录的 val_loss 最低（\3；没有 best.json）"),
    (r"of (\d+) checkpoints without best.json .*: (\S+)",
     r"\1 个没有 best.json 的 checkpoint 中，对 RL 查询的 pointer 期望 VQA 准确率最高（\2）"),
)  # fmt: skip
"""Why a checkpoint was taken (stages/checkpoint_choice.py), for Chinese records."""


def why(text: str | None, lang: str) -> str:
    """Why a checkpoint was taken, in a language; "not recorded" for None."""
    if not text:
        return pick(("未记录", "not recorded"), lang)
    for pattern, chinese in _WHYS if lang == "zh" else ():
        if found := re.fullmatch(pattern, text):
            return found.expand(chinese).replace("  ", " ")
    return text


def settings(configuration: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a record that the plan speaks of, and the others; without GRPO none of GRPO's."""
    used = {k: v for k, v in configuration.items() if k not in GRPO_SETTINGS or configuration.get("GRPO_EPOCHS") != 0}
    return {k: v for k, v in used.items() if k in PLAN_SETTINGS}, {
        k: v for k, v in used.items() if k not in PLAN_SETTINGS
    }


def adaptive_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a record's table of how many demonstrations: the policy, its rivals and what each costs.

    A best fixed number that differs between runs is shown with all of them, its price at the mean of theirs.
    """
    tokens, seconds, shots = found["prompt_tokens"], found["seconds_per_query"], found["shots"]
    best = [b["shot"] for b in found["best_fixed"]]

    def row(
        method: str, cells: list[tuple[str, int]], accuracy: float, number: float, note: str = ""
    ) -> dict[str, Any]:
        price = {
            name: None if table is None else sum(table[m][str(k)] for m, k in cells) / len(cells)
            for name, table in (("tokens", tokens), ("seconds", seconds))
        }
        return {"method": method, "note": note, "accuracy": accuracy, "number": number, **price}

    known = [("v3", k) for k in best]
    return [
        row("v3_adaptive", [("v3_adaptive", shots)], found["accuracy"], found["mean_demonstrations"]),
        row("v3_best_fixed", known, found["best_fixed_accuracy"], sum(best) / len(best),
            f" ({', '.join(str(k) for k in sorted(set(best)))})"),
        row("zero_shot", [("zero_shot", 0)], found["zero_shot"], 0.0),
    ]  # fmt: skip


def p_value(value: float) -> str:
    """Three decimals; what would round to 0 is said to be below 0.001."""
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def mcnemar(comparison: dict[str, Any]) -> str:
    """McNemar's p of each training seed, with Holm's correction where there is one; a dash where it has none."""
    each = comparison["p_value_each"]
    if each is None:
        return "—"
    if comparison["p_value_holm"] is not None:
        return f"{p_value(each[0])} ({p_value(comparison['p_value_holm'])})"
    return " / ".join(p_value(p) for p in each)


def shot_name(shot: int | str, lang: str) -> str:
    """``shot_num=1``, or the words for all shots together."""
    return f"shot_num={shot}" if shot != "pooled" else pick(("各 shot 合并", "all shots together"), lang)


def points(value: float) -> str:
    """Points with sign, one decimal, and a real minus."""
    return f"{value:+.1f}".replace("-", "−")


def interval(ends: list[float | None]) -> str:
    """``[−2.1, +2.9]``."""
    return "[" + ", ".join("?" if end is None else points(end) for end in ends) + "]"


def accuracy(cell: dict[str, Any] | None) -> str:
    """``71.2 [68.2, 73.9]`` of a record's cell; "" for None."""
    return "" if cell is None else f"{cell['mean']:.1f} [{cell['ci95'][0]:.1f}, {cell['ci95'][1]:.1f}]"


def count(value: int | None, lang: str) -> str:
    """A number with thousands separated; "not recorded" for None."""
    return pick(("未记录", "not recorded"), lang) if value is None else f"{value:,}"


def needed_n(comparison: dict[str, Any], delta: float) -> tuple[float, int | None]:
    """(target, n): the difference that further queries would have to show, at least ``delta`` points, and how many
    queries show it at 80 % power.
    """
    target = max(abs(comparison["diff"]), delta)
    if comparison["se"] is None:
        return target, None
    return target, stats.needed_n(comparison["se"], comparison["n"], target)


def rounded_n(n: int) -> str:
    """Two significant digits: an estimate of an estimate."""
    digits = max(0, len(str(n)) - 2)
    return f"{round(n, -digits):,}"


def verdict(comparison: dict[str, Any], delta: float, lang: str) -> str:
    """What a paired comparison allows to be said, with its numbers."""
    a, b, n = method(comparison["a"], lang), method(comparison["b"], lang), comparison["n"]
    numbers = pick(
        (f"{points(comparison['diff'])} 点，95% 区间 {interval(comparison['ci95'])}",
         f"{points(comparison['diff'])} points, 95 % interval {interval(comparison['ci95'])}"), lang,
    )  # fmt: skip
    if comparison["word"] == "better":
        return pick(
            (f"{_tight(a)}好于{_loose(b)}：{numbers}，n={n}", f"{a} is better than {b}: {numbers}, n = {n}"), lang
        )
    if comparison["word"] == "worse":
        return pick(
            (f"{_tight(a)}差于{_loose(b)}：{numbers}，n={n}", f"{a} is worse than {b}: {numbers}, n = {n}"), lang
        )
    rest = numbers + why_none(comparison, lang) + more_queries(comparison, delta, lang)
    return pick(
        (
            f"{_tight(a)}与{_loose(_tight(b))}在 n={n} 时未显示差异：{rest}",
            f"no difference shown at n = {n} between {a} and {b}: {rest}",
        ),
        lang,
    )


def brackets(text: str, lang: str) -> str:
    """A text in the language's brackets, with the blank that stands before them in English."""
    return pick((f"（{text}）", f" ({text})"), lang)


def _tight(name: str) -> str:
    """A name with the space that Chinese text wants after Latin letters, and none after a wide bracket."""
    return name if name.endswith("）") else name + " "


def _loose(name: str) -> str:
    """A name with the space that Chinese text wants before Latin letters."""
    return " " + name if name[0].isascii() else name


def more_queries(comparison: dict[str, Any], delta: float, lang: str) -> str:
    """How many queries would show the difference; empty where that cannot be said, or where it is not the number of
    queries that is lacking. Where the variation between training seeds is what makes the interval wide, it says that
    queries alone will not do.
    """
    target, n = needed_n(comparison, delta)
    if n is None:
        return ""
    recipe, (low, high) = comparison["recipe_ci95"], comparison["ci95"]
    if recipe is not None and recipe[1] - recipe[0] > SEEDS_DOMINATE * (high - low):
        return pick(
            ("；种子间差异是主要的不确定性，需要更多训练种子，只加查询不够",
             "; the variation between seeds is the main uncertainty: more training seeds are needed, not only queries"),
            lang,
        )  # fmt: skip
    if n <= comparison["n"]:
        return ""
    return pick(
        (f"；要显示 {target:.1f} 点的差异约需 n≈{rounded_n(n)}",
         f"; n ≈ {rounded_n(n)} would be needed to show one of {target:.1f} points"), lang,
    )  # fmt: skip


def why_none(comparison: dict[str, Any], lang: str) -> str:
    """Why an interval that excludes 0 is still no result (:func:`evidence.withheld`); empty for other comparisons."""
    reason = comparison["withheld"]
    if reason is None:
        return ""
    p, alpha = p_value(comparison["p_permutation"]), f"{comparison['alpha']:.2f}"
    told: dict[str, Sides] = {
        "images": (f"只有 {comparison['n_images']} 张图，太少", f"there are only {comparison['n_images']} images"),
        "signs": (f"符号翻转检验 p={p}，没有低于 {alpha}：这样的差异也可能只是偶然",
                  f"the sign-flip test's p = {p} is not below {alpha}: chance alone may do this, too"),
    }  # fmt: skip
    if reason == "main":
        told["main"] = (
            "各 shot 合并没有显示差异，而几个 shot 的“计入种子”区间没有为多次比较校正，所以不单独下结论",
            "all shots together show no difference, and the intervals with the seeds' variation are not corrected for "
            "several shots, so no single one is named",
        )
    if reason == "shots":
        holm = p_value(comparison["p_permutation_holm"])
        told["shots"] = (
            f"比较几个 shot 就有几次碰巧的机会：符号翻转检验 p={p}，经 Holm 校正为 {holm}，没有低于 {alpha}",
            f"several shots are several chances to be lucky: the sign-flip test's p = {p} becomes {holm} by Holm's "
            f"correction, not below {alpha}",
        )
    if reason == "seeds":
        recipe = interval(comparison["recipe_ci95"])
        told["seeds"] = (
            f"计入训练种子间差异后区间为 {recipe}，含 0：换一批种子可能没有这个差异",
            f"with the variation between training seeds the interval is {recipe} and includes 0: other seeds may not "
            "show it",
        )
    return pick(("；区间不含 0，但", "; the interval excludes 0, but "), lang) + pick(told[reason], lang)


def rule(seeded: bool, lang: str) -> str:
    """When better and worse are said (evidence.judge)."""
    main, shots, both = (f"{value:.2f}" for value in (stats.ALPHA_MAIN, stats.ALPHA_SHOTS, 1 - stats.LEVEL))
    chinese = (
        "“好于/差于”只在以下都成立时使用：95% 区间不含 0；符号翻转检验的 p 低于界限（各 shot 合并是主要结论，"
        f"界限 {main}；单个 shot 的 p 先经 Holm 校正，界限 {shots}，主要结论已有方向时为 {both}；"
        f"这样所有说法加起来，误报的机会不超过 5%）；至少 {stats.MIN_IMAGES} 张图"
    )
    english = (
        '"Better" and "worse" are said only where all of this holds: the 95 % interval excludes 0; the sign-flip '
        f"test's p is below its limit (all shots together are the main statement, limit {main}; a single shot's p is "
        f"corrected by Holm first, limit {shots}, or {both} once the main statement names a direction; so all "
        f"statements together raise at most 5 % false alarms); there are at least {stats.MIN_IMAGES} images"
    )
    if seeded:
        chinese += "；计入训练种子间差异的区间也不含 0"
        english += "; the interval with the variation between training seeds excludes 0, too"
    chinese, english = chinese + "。", english + "."
    return pick((chinese, english), lang)


def mark(word: str, lang: str) -> str:
    """One word for a table cell."""
    sides = {"better": ("好于", "better"), "worse": ("差于", "worse"), "none": ("未显示差异", "no difference shown")}
    return pick(sides[word], lang)


def result(comparison: dict[str, Any], lang: str) -> str:
    """:func:`mark`, and why where the interval beside it seems to say otherwise."""
    return mark(comparison["word"], lang) + why_none(comparison, lang)
