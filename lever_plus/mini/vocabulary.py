"""The words of the miniature world: shapes, colours, question types and their answers.

A *type* is a kind of question (where is it kept, who uses it, ...). Plain types are answered by one
word; compositional ones by "adjective noun", the adjective told by the colour and the noun by the shape.
"""

from dataclasses import dataclass

#: Eight families of three shapes; a shape's index is ``3 * family + member``.
FAMILIES: dict[str, tuple[str, str, str]] = {
    "round": ("disc", "ring", "half_disc"),
    "polygon": ("triangle", "square", "hexagon"),
    "star": ("star4", "star5", "star8"),
    "cross": ("plus", "saltire", "tee"),
    "arrow": ("arrow", "double_arrow", "chevron"),
    "bars": ("one_bar", "two_bars", "three_bars"),
    "soft": ("crescent", "heart", "drop"),
    "bent": ("ell", "you", "zed"),
}
SHAPES: tuple[str, ...] = tuple(shape for members in FAMILIES.values() for shape in members)
FAMILY_OF: tuple[int, ...] = tuple(index // 3 for index in range(len(SHAPES)))

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 40),
    "orange": (240, 135, 20),
    "yellow": (240, 220, 40),
    "green": (40, 145, 60),
    "blue": (35, 80, 205),
    "purple": (130, 45, 160),
    "black": (22, 22, 26),
    "white": (250, 250, 250),
}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)


@dataclass(frozen=True, slots=True)
class QuestionType:
    """One kind of question.

    ``answers`` and ``synonyms`` are 16 words each, position by position. ``adjectives`` is empty for a
    plain type and 16 words for a compositional one (then ``answers`` are its nouns).
    """

    name: str
    questions: tuple[str, str, str]
    answers: tuple[str, ...]
    synonyms: tuple[str, ...]
    adjectives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {len(self.answers), len(set(self.answers)), len(self.synonyms)}
        if sizes != {16} or len(set(self.adjectives)) not in (0, 16) or set(self.answers) & set(self.synonyms):
            raise AssertionError(f"type {self.name} needs 16 distinct words in each list")

    @property
    def compositional(self) -> bool:
        """Whether the answer is "adjective noun"."""
        return bool(self.adjectives)


def _pairs(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``"a/b c/d"`` -> (("a", "c"), ("b", "d"))."""
    split = [word.split("/") for word in text.split()]
    return tuple(word[0] for word in split), tuple(word[1] for word in split)


TYPES: tuple[QuestionType, ...] = (
    QuestionType(
        "place",
        ("Where is this usually kept?", "In which place would you find this?", "Where does it belong?"),
        *_pairs(
            "kitchen/pantry garage/carport garden/yard attic/loft cellar/basement office/bureau stable/barn "
            "library/archive harbor/port tent/camp chapel/church market/bazaar school/classroom bakery/shop "
            "museum/gallery theater/stage"
        ),
    ),
    QuestionType(
        "use",
        ("What is this used for?", "What would you do with it?", "What is the purpose of this?"),
        *_pairs(
            "cooking/frying fishing/angling sewing/stitching painting/drawing digging/shoveling cleaning/washing "
            "writing/noting sailing/boating hunting/chasing racing/speeding dancing/prancing reading/studying "
            "baking/roasting climbing/ascending farming/planting weighing/measuring"
        ),
    ),
    QuestionType(
        "person",
        ("Who uses this?", "What kind of person would own it?", "Who works with this?"),
        *_pairs(
            "farmer/grower doctor/medic sailor/seaman teacher/tutor baker/cook pilot/flyer nurse/carer judge/lawyer "
            "soldier/trooper painter/artist singer/vocalist miner/digger tailor/sewer hunter/trapper priest/monk "
            "plumber/fitter"
        ),
    ),
    QuestionType(
        "animal",
        ("Which animal likes this?", "What animal is often seen with it?", "Which animal would play with this?"),
        *_pairs(
            "horse/pony tiger/cat rabbit/hare eagle/bird shark/fish camel/dromedary monkey/ape donkey/mule "
            "turtle/tortoise spider/bug parrot/macaw dolphin/whale goose/duck lizard/gecko badger/weasel beaver/otter"
        ),
    ),
    QuestionType(
        "food",
        ("What food goes with this?", "Which food is served on it?", "What would you eat with this?"),
        *_pairs(
            "bread/toast cheese/cheddar rice/grain soup/broth salad/greens pasta/noodles honey/nectar butter/spread "
            "bacon/ham curry/stew beans/peas pizza/pie cake/pastry fruit/apple steak/beef potato/spud"
        ),
    ),
    QuestionType(
        "country",
        ("Which country does it come from?", "Where was this invented?", "In what country is this made?"),
        *_pairs(
            "france/paris brazil/rio japan/tokyo egypt/cairo india/delhi mexico/cancun canada/toronto norway/oslo "
            "kenya/nairobi greece/athens spain/madrid turkey/ankara peru/lima chile/santiago nepal/tibet cuba/havana"
        ),
    ),
    QuestionType(
        "material",
        ("What is it made of?", "Which material is this?", "What was used to build it?"),
        *_pairs(
            "oak/wood steel/metal glass/crystal clay/mud wool/yarn silk/cloth stone/rock paper/pulp rubber/latex "
            "leather/hide copper/brass marble/granite bamboo/cane cotton/linen plastic/vinyl wax/tallow"
        ),
        adjectives=tuple(
            "polished rough thin woven painted carved old heavy hollow shiny brittle pressed melted twisted raw "
            "folded".split()
        ),
    ),
    QuestionType(
        "smell",
        ("What does it smell like?", "Which smell comes from this?", "How would you describe its smell?"),
        *_pairs(
            "lemon/lime smoke/ash mint/herb rose/flower coffee/mocha vanilla/cream pine/resin ginger/root "
            "garlic/clove onion/leek pepper/spice tobacco/cigar cinnamon/bark soap/foam grass/hay plum/prune"
        ),
        adjectives=tuple(
            "sweet fresh burnt sour dry wet warm bitter faint strong spicy clean dusty ripe sharp mild".split()
        ),
    ),
)
TYPE_NAMES: tuple[str, ...] = tuple(kind.name for kind in TYPES)
