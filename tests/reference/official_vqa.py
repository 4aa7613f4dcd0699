"""The official VQA evaluation, stated plainly: one rule a function, one word a table row, no shortcuts.

Slow and literal on purpose; tests hold ``open_mmicl.metrics.vqa`` against it. Source: the description on
visualqa.org/evaluation.html and the behaviour of the published ``vqaEval.py`` (its quirks are marked).
"""

NUMBER_WORDS = {
    "none": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10,
}  # fmt: skip
PUNCTUATION = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
CONTRACTIONS = dict(pair.split(">") for pair in """
aint>ain't arent>aren't cant>can't couldve>could've couldnt>couldn't couldn'tve>couldn't've couldnt've>couldn't've
didnt>didn't doesnt>doesn't dont>don't hadnt>hadn't hadnt've>hadn't've hadn'tve>hadn't've hasnt>hasn't havent>haven't
hed>he'd hed've>he'd've he'dve>he'd've hes>he's howd>how'd howll>how'll hows>how's Id've>I'd've I'dve>I'd've Im>I'm
Ive>I've isnt>isn't itd>it'd itd've>it'd've it'dve>it'd've itll>it'll let's>let's maam>ma'am mightnt>mightn't
mightnt've>mightn't've mightn'tve>mightn't've mightve>might've mustnt>mustn't mustve>must've neednt>needn't
notve>not've oclock>o'clock oughtnt>oughtn't ow's'at>'ow's'at 'ows'at>'ow's'at 'ow'sat>'ow's'at shant>shan't
shed've>she'd've she'dve>she'd've she's>she's shouldve>should've shouldnt>shouldn't shouldnt've>shouldn't've
shouldn'tve>shouldn't've somebody'd>somebodyd somebodyd've>somebody'd've somebody'dve>somebody'd've
somebodyll>somebody'll somebodys>somebody's someoned>someone'd someoned've>someone'd've someone'dve>someone'd've
someonell>someone'll someones>someone's somethingd>something'd somethingd've>something'd've
something'dve>something'd've somethingll>something'll thats>that's thered>there'd thered've>there'd've
there'dve>there'd've therere>there're theres>there's theyd>they'd theyd've>they'd've they'dve>they'd've
theyll>they'll theyre>they're theyve>they've twas>'twas wasnt>wasn't wed've>we'd've we'dve>we'd've weve>we've
werent>weren't whatll>what'll whatre>what're whats>what's whatve>what've whens>when's whered>where'd wheres>where's
whereve>where've whod>who'd whod've>who'd've who'dve>who'd've wholl>who'll whos>who's whove>who've whyll>why'll
whyre>why're whys>why's wont>won't wouldve>would've wouldnt>wouldn't wouldnt've>wouldn't've wouldn'tve>wouldn't've
yall>y'all yall'll>y'all'll y'allll>y'all'll yall'd've>y'all'd've y'alld've>y'all'd've y'all'dve>y'all'd've
youd>you'd youd've>you'd've you'dve>you'd've youll>you'll youre>you're youve>you've
""".split())  # fmt: skip


def has_comma_between_digits(text: str) -> bool:
    return any(a.isdecimal() and b == "," and c.isdecimal() for a, b, c in zip(text, text[1:], text[2:], strict=False))


def strip_punctuation(text: str) -> str:
    result = text
    for mark in PUNCTUATION:
        beside_space = (mark + " ") in text or (" " + mark) in text
        if beside_space or has_comma_between_digits(text):
            result = result.replace(mark, "")
        else:
            result = result.replace(mark, " ")
    return strip_full_stops(result)


def strip_full_stops(text: str) -> str:
    """A full stop goes unless a digit follows. Quirk: at most 32 of them (a flag stands where the count belongs)."""
    kept, removed = [], 0
    for i, char in enumerate(text):
        digit_follows = i + 1 < len(text) and text[i + 1].isdecimal()
        if char == "." and not digit_follows and removed < 32:
            removed += 1
            continue
        kept.append(char)
    return "".join(kept)


def digits_and_articles(text: str) -> str:
    words = []
    for word in text.lower().split():
        if word in NUMBER_WORDS:
            word = str(NUMBER_WORDS[word])
        if word in ("a", "an", "the"):
            continue
        words.append(word)
    for i in range(len(words)):
        if words[i] in CONTRACTIONS:  # quirk: the keys with a capital I are never met, the text is lower case
            words[i] = CONTRACTIONS[words[i]]
    return " ".join(words)


def normalize(text: str) -> str:
    text = text.replace("\n", " ")
    text = text.replace("\t", " ")
    text = text.strip()
    return digits_and_articles(strip_punctuation(text))


def accuracy(prediction: str, answers: list[str]) -> float:
    prediction = normalize(prediction)
    answers = [normalize(answer) for answer in answers]
    scores = []
    for left_out in range(len(answers)):
        others = [answer for i, answer in enumerate(answers) if i != left_out]
        matching = [answer for answer in others if answer == prediction]
        scores.append(min(1, float(len(matching)) / 3))
    return float(sum(scores)) / len(scores)
