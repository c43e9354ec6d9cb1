"""Words of a prompt -> groups of token positions."""

import json
import re
from itertools import combinations, product
from pathlib import Path

import pytest
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from transformers import CLIPTokenizer

import attend_excite
from attend_excite import nouns
from attend_excite.nouns import find_nouns, modifiers_of, other_language
from attend_excite.subjects import Stream, Subject, cuts_of, locate, parse, unmarked, words_of

TOKENIZER = Path(attend_excite.__file__).parent / "models" / "stickers" / "tokenizer"

# The benchmark of the paper (table 3).
WORDS = json.loads((Path(attend_excite.__file__).parent / "data" / "benchmark.json").read_text())
ANIMALS, OBJECTS, COLOURS, WORN = (WORDS[kind] for kind in ("animals", "objects", "colours", "worn"))


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)


@pytest.fixture(scope="module")
def short_tokenizer():
    return CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=16)


def placed(prompt):
    return [(group.text, group.positions) for group in prompt.groups]


def benchmark():
    for pair in combinations(ANIMALS, 2):
        yield "a {} and a {}".format(*pair), pair
    for animal, thing in product(ANIMALS, OBJECTS):
        if thing in WORN:
            yield f"a {animal} with a {thing}", (animal, thing)
        else:
            for colour in COLOURS:
                yield f"a {animal} and a {colour} {thing}", (animal, thing)
    for one, other in combinations(OBJECTS, 2):
        for i, colour in enumerate(COLOURS):
            # Each colour on both sides, without all 121 pairs.
            yield f"a {colour} {one} and a {COLOURS[i - 3]} {other}", (one, other)


def test_benchmark_in_every_colour():
    wrong = {
        prompt: found
        for prompt, subjects in benchmark()
        if (found := tuple(noun.text for noun in find_nouns(prompt))) != subjects or other_language(prompt)
    }
    assert not wrong


def test_an_endless_word_is_read_by_its_end(monkeypatch):
    """The tagger's time grows with the square of a word's letters: a minute for 5,000."""
    tagger = nouns._tagger()

    class Impatient:
        def tag_sent(self, words, taglevel):
            if max(map(len, words)) > 50:
                pytest.fail("it would take too long")
            return tagger.tag_sent(words, taglevel=taglevel)

    monkeypatch.setattr(nouns, "_tagger", Impatient)
    assert [noun.text for noun in find_nouns(f"a {'x' * 5000} and a frog")][-1] == "frog"
    long = "anti" * 20 + "cats"
    assert [noun.text for noun in find_nouns(f"a {long} and frogs")] == [long, "frogs"]


def test_benchmark_prompts_give_exactly_their_colours():
    for prompt, subjects in benchmark():
        words = prompt.split()
        places = (words.index(subjects[0]), len(words) - 1)  # "a orange apple and a pink ..."
        colours = [[word for word in words[place - 1 : place] if word in COLOURS] for place in places]
        said = [
            [prompt[slice(*span)] for span in modifiers_of(noun.head_span, prompt)]
            for noun in find_nouns(prompt)
        ]
        assert said == colours, prompt


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a red and blue bird", {"bird": "red blue"}),
        ("a small, fluffy, and brown cat with a blue hat", {"cat": "small fluffy brown", "hat": "blue"}),
        ("a bear with yellow and green glasses", {"bear": "", "glasses": "yellow green"}),
        ("a teddy bear in a crystal clear river", {"bear": "teddy", "river": "crystal clear"}),
        ("the bowl is very yellow and round", {"bowl": "yellow round"}),
        ("a bowl is yellow and red apples lie in it", {"bowl": "yellow", "apples": "red"}),
        # Not a neighbour's, an owner, a number or an adverb.
        ("a cat, red bowl and brown dog", {"cat": "", "bowl": "red", "dog": "brown"}),
        ("two very small dogs and a man's hat", {"dogs": "small", "hat": ""}),
    ],
)
def test_what_is_said_of_a_noun(prompt, said):
    found = {
        noun.head: " ".join(prompt[slice(*span)] for span in modifiers_of(noun.head_span, prompt))
        for noun in find_nouns(prompt)
    }
    assert found == said


def attributes(prompt):
    return [[(each.text, each.positions) for each in group.attributes] for group in prompt.groups]


def test_subjects_carry_what_is_said_of_them(tokenizer):
    text = "a yellow bowl and a red and sombrero cat"
    assert attributes(parse("a yellow bowl and a red cat", tokenizer)) == [
        [("yellow", (2,))],
        [("red", (6,))],
    ]
    for subjects in (
        ["yellow bowl"],
        ["bowl"],
        [3],
        [Subject("bowl")],
        [Subject("bowl", attributes=["yellow"])],
    ):
        assert attributes(parse("a yellow bowl", tokenizer, subjects)) == [[("yellow", (2,))]]
    assert attributes(parse("a [yellow bowl] and a cat", tokenizer)) == [[("yellow", (2,))]]
    # As the caller says: none, others, one of several tokens; of several the nearest, before it first.
    assert attributes(parse(text, tokenizer, [Subject("bowl", attributes=[])])) == [[]]
    named = Subject("cat", attributes=["sombrero", "red"])
    assert attributes(parse(text, tokenizer, [named])) == [[("sombrero", (8, 9)), ("red", (6,))]]
    twice = parse("a red cat, a red bowl is red", tokenizer, [Subject("bowl", attributes=["red"])])
    assert attributes(twice) == [[("red", (6,))]]
    # What is a subject itself is nobody's attribute.
    assert attributes(parse("a teddy bear", tokenizer, ["bear", "teddy"])) == [[], []]


def test_attributes_lie_in_every_table_of_tokens(tokenizer):
    tables = [Stream("long", tokenizer, 0, 77), Stream("short", tokenizer, 77, 6)]
    bowl, cat = parse("a yellow bowl and a red sombrero cat", tables).groups
    assert [(each.positions, each.further) for each in bowl.attributes] == [((2,), ((2,),))]
    # What stands between positions is none of the subject, in any table.
    (apart,) = parse("a cat and a frog", [tables[0], Stream("other", tokenizer, 77, 77)], [[2, 5]]).groups
    assert (apart.positions, apart.further) == ((2, 5), ((2, 5),))
    # The short one cuts the cat and what is said of it.
    assert cat.further == ((),)
    assert [(each.positions, each.further) for each in cat.attributes] == [((6,), ((),)), ((7, 8), ((),))]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (["yelow"], "the attribute 'yelow' of 'bowl' is not in the prompt: did you mean 'yellow'"),
        ([" "], "an attribute of 'bowl' is empty"),
        ("yellow", r"the attributes of 'bowl' must be a list, like \['yellow'\]"),
    ],
)
def test_attributes_that_cannot_be_are_refused(tokenizer, attributes, message):
    with pytest.raises(ValueError, match=message):
        parse("a yellow bowl", tokenizer, [Subject("bowl", attributes=attributes)])


@pytest.mark.parametrize(
    ("prompt", "nouns"),
    [
        # Prompts of the paper.
        (
            "A grizzly bear catching a salmon in a crystal clear river surrounded by a forest",
            "grizzly bear, salmon, crystal clear river, forest",
        ),
        (
            "A pod of dolphins leaping out of the water in an ocean with a ship on the background",
            "dolphins, water, ocean, ship",
        ),
        (
            "A playful kitten chasing a butterfly in a wildflower meadow",
            "kitten, butterfly, wildflower meadow",
        ),
        ("A cat and a dog reading in the library", "cat, dog, library"),
        ("a painting of an elephant with glasses", "elephant, glasses"),
        ("A Picasso painting in a garden", "Picasso painting, garden"),
        (
            "Rice with red sauce with eggs over the top and orange slices on the side",
            "Rice, sauce, eggs, slices",
        ),
        (
            "Two elephants walking by a green wall with tan palm trees painted on it",
            "elephants, wall, palm trees",
        ),
        # Colours, words unknown to the tagger, participles, adjectives that stand for a noun.
        ("an orange and a lemon", "orange, lemon"),
        ("a cat in orange", "cat"),
        ("a red and blue bird", "bird"),
        ("a corgi and a t-rex", "corgi, t-rex"),
        ("a frog and a white corgi", "frog, corgi"),
        ("a blue dog running and a red cat sleeping", "dog, cat"),
        ("a remote and a small, fluffy cat", "remote, cat"),
        ("a man's hat", "man's hat"),
        # Nouns joined by a hyphen that the tagger takes for an adjective, and adjectives that are ones.
        ("ice-cream and a cat eating ice-cream", "ice-cream, cat, ice-cream"),
        ("jelly-fish and star-fish", "jelly-fish, star-fish"),
        ("a blue-eyed cat and a fire-engine red car", "cat, car"),
        # Frames, styles, quality tags, absent things.
        ("paintings of a fox in the style of Van Gogh", "fox"),
        ("an oil painting of a castle by Claude Monet, digital art, 4k", "castle"),
        ("a pair of glasses on top of a car", "glasses, car"),
        ("a cat without a big hat and a dog with no shoes", "cat, dog"),
        ("of cats in a style", "cats"),
        ("two", ""),
        ("", ""),
    ],
)
def test_nouns(prompt, nouns):
    found = find_nouns(prompt)
    assert ", ".join(noun.text for noun in found) == nouns
    for noun in found:
        assert prompt[slice(*noun.span)] == noun.text
        assert prompt[slice(*noun.head_span)] == noun.head
        assert noun.text.endswith(noun.head)


def test_automatic_groups_lie_on_the_heads(tokenizer):
    prompt = parse("A grizzly bear with a sombrero", tokenizer)
    assert placed(prompt) == [("grizzly bear", (3,)), ("sombrero", (6, 7))]
    assert prompt.tokens[1:-1] == ("A", "grizzly", "bear", "with", "a", "som", "brero")
    assert all(group.target == 1.0 and not group.negated for group in prompt.groups)


def test_accents_do_not_shift_positions(tokenizer):
    decomposed = "a pin\u0303ata, a cafe\u0301 and a frog"
    frog = parse(decomposed, tokenizer).groups[-1]
    assert frog.text == "frog"
    assert frog == parse("a piñata, a café and a frog", tokenizer).groups[-1]


@pytest.mark.parametrize(
    ("written", "text", "groups"),
    [
        ("a [cat] and a [ frog ]", "a cat and a  frog ", [("cat", (2,)), ("frog", (5,))]),
        ("a [yellow bowl]", "a yellow bowl", [("yellow bowl", (3,))]),
        ("a car and a [car]", "a car and a car", [("car#2", (5,))]),
        (r"a \[cat\] and a [very big frog]", "a [cat] and a very big frog", [("very big frog", (9,))]),
        ("a [red] cat", "a red cat", [("red", (2,))]),
        ("a [remote] and a [painting]", "a remote and a painting", [("remote", (2,)), ("painting", (5,))]),
    ],
)
def test_brackets(tokenizer, written, text, groups):
    prompt = parse(written, tokenizer)
    assert prompt.text == text
    assert placed(prompt) == groups
    assert parse(unmarked(written), tokenizer, ()).text == text


@pytest.mark.parametrize(
    ("prompt", "nouns", "named"),
    [
        ("(cat:1.3) and a (big frog: 0.8)", "cat, frog", ["(cat:1.3)", "(big frog: 0.8)"]),
        ("a cat and a frog, [blurry]", "cat, frog", ["[blurry]"]),
        ("<lora:add_detail:0.8> a cat BREAK a frog", "cat, frog", ["<lora:add_detail:0.8>", "BREAK"]),
        ("a ((cat)), [watermark]", "cat", ["((", "[watermark]"]),
        ("a [cat:dog:0.5] and a frog", "frog", ["[cat:dog:0.5]"]),
        ("a cat --ar 16:9 --v 5", "cat", ["--ar 16:9", "--v 5"]),
    ],
)
def test_instructions_to_other_programs_are_told_once_and_are_no_subjects(tokenizer, prompt, nouns, named):
    with pytest.warns(UserWarning, match="other programs") as told:
        parsed = parse(prompt, tokenizer)
    assert ", ".join(group.text for group in parsed.groups) == nouns
    (warning,) = told
    assert all(f"'{each}'" in str(warning.message) for each in named)
    assert parsed.text == prompt.replace("[", "").replace("]", "")


@pytest.mark.parametrize(
    "prompt", ["a cat (sitting) at 9:30", "a clock (16:9)", "a <toy> and a cat", "a well-known cat - a tabby"]
)
def test_what_only_looks_like_an_instruction_is_none(tokenizer, prompt, recwarn):
    parse(prompt, tokenizer)
    assert not recwarn.list


@pytest.mark.parametrize("subjects", [["lora"], [4]])
def test_a_part_of_an_instruction_cannot_be_named(tokenizer, subjects):
    message = "is a part of '<lora:x:1>', which names nothing in the picture"
    with pytest.warns(UserWarning, match="instruction"), pytest.raises(ValueError, match=message):
        parse("<lora:x:1> a cat", tokenizer, subjects)


@pytest.mark.parametrize(
    ("prompt", "language"),
    [
        ("un chat et une grenouille", "French"),
        ("eine Katze und ein Frosch", "German"),
        ("uma gata e um sapo", "Portuguese"),
        ("un gato y una rana", "another language"),
        ("кошка и лягушка", "another language"),
        ("猫とカエル", "another language"),
    ],
)
def test_other_languages_are_noticed_and_their_subjects_asked_for(tokenizer, prompt, language):
    with pytest.raises(ValueError, match=f"seems to be in {language}, and nouns .* name the subjects"):
        parse(prompt, tokenizer)
    last = prompt.split()[-1]
    assert parse(prompt, tokenizer, [last]).groups[0].text == last


@pytest.mark.parametrize(
    "prompt",
    ["Mona Lisa", "a portrait of Juan de la Cruz", "MIT campus", "Big Sur", "", "a 猫", "corgi, t-rex"],
)
def test_english_with_foreign_names_is_english(prompt):
    assert other_language(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "subjects", "groups"),
    [
        ("a Cat and a  yellow bowl", ["yellow  BOWL", "cat"], [("yellow BOWL", 6), ("cat", 2)]),
        ("a car and a car", ["car", "car"], [("car", 2), ("car#2", 5)]),
        ("a car and a car", ["car#2", "car"], [("car#2", 5), ("car", 2)]),
        ("a cat and a frog", [5, Subject("cat")], [("frog", 5), ("cat", 2)]),
        ("a cat in red", ["red"], [("red", 4)]),
        ("a t-rex", ["t-rex"], [("t-rex", (2, 4))]),
        ("a cat #7 and a cat #7", ["cat #7", "cat#2"], [("cat #7", 2), ("cat#2", 7)]),
        ("a sombrero", [[3, 2]], [("sombrero", (2, 3))]),
        ("a sombrero and a sombrero", [2, 6], [("som", 2), ("som#2", 6)]),
    ],
)
def test_named_subjects(tokenizer, prompt, subjects, groups):
    expected = [(text, at if isinstance(at, tuple) else (at,)) for text, at in groups]
    assert placed(parse(prompt, tokenizer, subjects)) == expected


def test_targets_and_negation(tokenizer):
    subjects = ["frog=0.7", "-hat", "-cat=0.1", Subject("dog", target=0.5)]
    groups = parse("a frog with a hat, a cat and a dog", tokenizer, subjects).groups
    assert [(group.text, group.target, group.negated) for group in groups] == [
        ("frog", 0.7, False),
        ("hat", 0.0, True),
        ("cat", 0.1, True),
        ("dog", 0.5, False),
    ]


def test_a_mapping_gives_targets(tokenizer):
    groups = parse("a frog with a hat and a cat", tokenizer, {"frog": 0.3, "-hat": 0.1, "cat": None}).groups
    assert [(group.text, group.target, group.negated) for group in groups] == [
        ("frog", 0.3, False),
        ("hat", 0.1, True),
        ("cat", 1.0, False),
    ]


@pytest.mark.parametrize(
    "text", ["a bear and a grizzly bear and a bear", "a red car and a blue car and a car"]
)
def test_texts_of_groups_name_them_again(tokenizer, text):
    groups = parse(text, tokenizer).groups
    assert len({group.text for group in groups}) == 3
    assert parse(text, tokenizer, [group.text for group in groups]).groups == groups


@pytest.mark.parametrize(
    ("prompt", "subjects", "message"),
    [
        ("  ", None, "prompt is empty"),
        ("very red", None, "no noun found in 'very red': name the subjects with subjects=[...]"),
        ("a [cat", None, "unbalanced brackets"),
        ("a cat]", None, "unbalanced brackets"),
        ("a [[cat]]", None, "unbalanced brackets"),
        ("a [ ] cat", None, "empty brackets"),
        ("a [cat]", ["cat"], "use one of them"),
        ("a cat", "cat", "must be a list"),
        ("a cat", ["-"], "a subject is empty"),
        ("a cat and a frog", ["forg"], "'forg' is not in the prompt: did you mean 'frog'?"),
        ("a scatter", ["cat"], "'cat' is not in the prompt"),
        ("a cat", ["cat", "cat"], "'cat#2' is not in the prompt: it has 'cat' once"),
        ("a cat and a cat", ["cat#0"], "it has 'cat' 2 times"),
        ("a black cat", ["cat", "black cat"], "'cat' and 'black cat' are the same word"),
        ("a cat", [3], "position 3 is out of range: the prompt's tokens are 1 to 2"),
        ("a cat", [[0, 1]], "position 0 is out of range"),
        ("a cat", [[]], "no token positions"),
        ("a cat", [["cat"]], "['cat'] is no subject: give a word or phrase, a token position"),
        ("a cat", [1.7], "1.7 is no subject"),
        ("a cat", ["cat=1.5"], "the target 1.5 of 'cat' is out of range"),
        ("a cat", ["cat=nan"], "out of range"),
        ("a cat", ["cat=much"], "is not a number"),
        ("a cat", {"cat": "much"}, "is no subject with its target"),
        ("a cat", {"cat": 1.5}, "the target 1.5 of 'cat' is out of range"),
        ("a cat", {"cat=0.5": 0.3}, "'cat=0.5' has two targets"),
        ("a cat", 2, "must be a list, like [2]"),
        (None, None, "the prompt is None: it must be a text"),
        ("a cat and a frog", ["cat and a frog"], "names several things: give each as a subject of its own"),
        (
            "a [cat and a frog]",
            None,
            "names several things: give each as a subject of its own, as ['cat', 'fr",
        ),
        ("a cat, a big frog", ["cat, a big frog"], "as ['cat', 'frog']"),
        ("a cat and a frog", ["cat,frog"], "'cat,frog' is not in the prompt: give each as a subject of its"),
    ],
)
def test_bad_input_says_what_to_do(tokenizer, prompt, subjects, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(prompt, tokenizer, subjects)


class TestBeyondTheContext:
    filler = "very " * 10

    @pytest.mark.parametrize("subjects", [None, ["cat"]])
    def test_subjects_inside_work_and_the_rest_is_known(self, short_tokenizer, subjects):
        prompt = parse(f"a cat and {self.filler}big frog", short_tokenizer, subjects)
        assert prompt.cut == "frog"
        assert cuts_of(prompt.text, short_tokenizer) == [("", 16, "frog")]
        assert placed(prompt) == [("cat", (2,))]
        assert len(prompt.tokens) == 16

    @pytest.mark.parametrize("subjects", [None, ["frog"]])
    def test_subjects_outside_do_not(self, short_tokenizer, subjects):
        message = "'frog' lies beyond the model's context of 16 tokens, which cuts 'blue frog'"
        with pytest.raises(ValueError, match=message):
            parse(f"{self.filler}{'big ' * 4}blue frog", short_tokenizer, subjects)

    def test_a_word_cut_in_two_is_cut(self, short_tokenizer):
        with pytest.raises(ValueError, match="'sombrero' lies beyond"):
            parse(f"{self.filler}big big a sombrero", short_tokenizer)

    def test_of_two_tables_each_says_what_it_cuts(self, short_tokenizer, tokenizer):
        text = f"a cat and {self.filler}big frog"
        tables = [Stream("CLIP", short_tokenizer, 0, 16), Stream("T5", tokenizer, 16, 77)]
        assert cuts_of(text, tables) == [("CLIP", 16, "frog")]
        prompt = parse(text, tables, ["frog"])
        assert (prompt.cut, prompt.groups[0].positions, prompt.groups[0].further) == ("", (), ((15,),))

    def test_a_prompt_that_just_fits(self, short_tokenizer):
        prompt = parse(f"{self.filler}big big a frog ", short_tokenizer)
        assert placed(prompt) == [("frog", (14,))]
        assert prompt.cut == ""


@pytest.mark.parametrize(
    "text",
    [
        "a <toy> and a frog",
        "a <Toy> and a frog",  # written out by no one, so one token
        "two <toy>s and a <TOY> beside a <toy> and a frog",
        "a <toy>_1 and a frog",
        "a plum, two plums and a frog",  # "plum" is learnt, and stands in "plums"
    ],
)
def test_positions_are_those_of_what_the_encoder_gets(text):
    """As the pipeline writes learnt words out, and so cut where the pipeline cuts them."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=24)
    tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2", "plum", "plum_1"])
    prompt = parse(text, tokenizer, ["frog"])
    ids = tokenizer(TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)).input_ids
    assert len(prompt.tokens) == len(ids)
    ((frog,),) = [group.positions for group in prompt.groups]
    assert tokenizer.convert_ids_to_tokens(ids[frog]) == "frog</w>"


def test_a_learnt_word_of_several_vectors_is_one_subject_and_is_cut_whole():
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=16)
    tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2"])
    assert placed(parse("a <toy> and a frog", tokenizer, ["<toy>"])) == [("<toy>", (2, 3, 4))]
    with pytest.raises(ValueError, match="beyond the model's context"):
        parse("a <toy> and a <toy> and a <toy> or a <toy> frog", tokenizer, ["frog"])
    # The context ends between its second vector and its third.
    assert parse("a <toy> and a <toy> and a big <toy>", tokenizer, ()).cut == "<toy>"


def test_every_word_of_a_text_is_found_by_its_name(tokenizer):
    text = "a cat, a Cat and a t-shirt"
    named = list(words_of(text))
    assert named == ["a", "cat", "a#2", "Cat#2", "and", "a#3", "t-shirt"]
    assert [locate(word, text, tokenizer)[0] for word in named] == [1, 2, 4, 5, 6, 7, 8]
    # Alone "shirt" may also be a part of another word.
    text = "a t-shirt and a shirt"
    assert list(words_of(text))[-1] == "shirt#2"
    assert [locate(word, text, tokenizer)[0] for word in words_of(text)] == [1, 2, 5, 6, 7]
