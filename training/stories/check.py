"""Checks sampled stories and prints statistics and samples to read.

python -m training.stories.check 20000            # 8 s
python -m training.stories.check 500 --show 10 --plot the_letter
"""

import argparse
import random
import re
import sys
import time
from collections import Counter

from training.stories import HELD_OUT, Story, sample, sample_about, words
from training.stories.grammar import an, sentences
from training.stories.plotfile import plots
from training.stories.tell import hero_stays, repeats

ARTICLE = re.compile(r"\b([Aa]n?) ([a-z][a-z-]*)")
# A small letter may begin no sentence, but a speech may go on with "he said".
SPEAKS = r"(?:said|asked|called|cried|shouted|told|thought|whispered|wondered|wrote)"
LOWER_START = re.compile(rf'(?:^|[.!?] |\n)"?[a-z]|[.!?]" (?:he|she|they) (?!{SPEAKS})')
SPEECH_CUT = re.compile(rf'[!?]" (?:He|She|They) {SPEAKS}')
WORDS = {"text": (60, 250), "summary": (15, 110), "sequel": (60, 120)}


def _marks(text: str) -> list[str]:
    """What is wrong with the marks and letters of one text."""
    found = []
    if "{" in text or "}" in text or "[" in text:
        found.append("an unfilled slot")
    if "  " in text or " ." in text or " ," in text or ".." in text or ",," in text:
        found.append("odd spaces or stops")
    if not text.isascii():
        found.append("not ASCII")
    if any(paragraph.count('"') % 2 for paragraph in text.split("\n\n")):
        found.append("unbalanced quotation marks")
    if LOWER_START.search(text):
        found.append("a sentence begins small")
    if SPEECH_CUT.search(text):
        found.append("a speech is cut off from its speaker")
    if text[-1] not in '.!?"':
        found.append("no end")
    return found


def _articles(text: str) -> list[str]:
    pairs = ARTICLE.findall(text)
    return [f"{a} {word}" for a, word in pairs if an(word).split()[0] != a.lower()]


def _hero(story: Story) -> list[str]:
    kind = words.kinds().get(story.hero)
    later = kind.later if kind else (f"the {story.hero}",)
    forms = (story.hero_name, *later, *(form.capitalize() for form in later))
    noun = story.facts["object"]
    found = [] if hero_stays(sentences(story.text), forms, noun) else ["the hero or the object is lost"]
    if story.text.count(noun) < 2:
        found.append("the object is hardly mentioned")
    if story.hero.split()[-1] not in story.text:
        found.append("the kind of hero is not named")
    return found


def _friend(story: Story) -> list[str]:
    """The friend's kind must be known when the name is first used."""
    name, kind = story.facts["friend_name"], story.facts["friend_kind"]
    first = re.search(rf"\b{name}\b", story.text)
    if not first:
        return []
    near = story.text[max(0, first.start() - len(kind) - 20) : first.end() + len(kind) + 6]
    return [] if kind in near else ["the friend is not introduced"]


def problems(story: Story) -> list[str]:
    """Everything that the rules find wrong with a story; empty for a good one."""
    found = _hero(story) + _friend(story)
    for part, (low, high) in WORDS.items():
        text: str = getattr(story, part)
        found += [f"{part}: {what}" for what in _marks(text) + _articles(text)]
        n_words = len(text.split())
        if not low <= n_words <= high:
            found.append(f"{part}: {n_words} words")
        if part != "summary" and repeats(text, sentences(text)):
            found.append(f"{part}: repeats itself")
    found += [f"request: {what}" for what in _articles(story.request)]
    if "name" in story.asked and story.hero_name.lower() not in story.request.lower():
        found.append("the request does not name the hero")
    if story.object and story.object not in story.request.lower():
        found.append("the request does not name the object")
    if "place" in story.asked and story.place.split(" the ")[-1] not in story.text:
        found.append("the place asked for is not named")
    if "lesson" in story.asked and story.facts["lesson"].lower() not in story.text.lower():
        found.append("the lesson asked for is not said")
    if "friend" in story.asked and story.facts["friend_kind"] not in story.text:
        found.append("the friend asked for is missing")
    if {(story.hero, story.facts["object"]), (story.hero, story.plot)} & HELD_OUT:
        found.append("held out")
    return found


def show(story: Story) -> None:
    print(f">> {story.request}   [{story.plot}, {story.style}]\n{story.text}")
    print(f"-- {story.summary}\n-- {story.sequel}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("n", type=int, nargs="?", default=2000)
    parser.add_argument("--show", type=int, default=10)
    parser.add_argument("--plot", help="show only stories of this plot")
    parser.add_argument("--wrong", type=int, default=1, help="examples of each fault to print")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    started = time.process_time()
    stories = [sample(rng) for _ in range(args.n)]
    rate = args.n / (time.process_time() - started)
    wrong: Counter[str] = Counter()
    for story in stories:
        for what in problems(story):
            wrong[what] += 1
            if wrong[what] <= args.wrong:
                print(f"WRONG ({what}):")
                show(story)
    for _ in range(args.show):
        show(sample_about(rng, plot=args.plot) if args.plot else sample(rng))
    n_words = [len(story.text.split()) for story in stories]
    heroes, told = {story.hero for story in stories}, {story.plot for story in stories}
    things = {story.facts["object"] for story in stories}
    print(f"{args.n} stories, {rate:.0f} a second, {sum(n_words) / len(n_words):.0f} words on average")
    print(f"{len(heroes)} heroes of {len(words.kinds())}, {len(things)} objects of {len(words.things())}")
    print(f"{len(told)} plots of {len(plots())}, {len(HELD_OUT)} pairs held out")
    print(f"{len({story.text for story in stories})} different texts, {sum(n_words) * 4 // 3} tokens or so")
    print("wrong:", dict(wrong.most_common()) or "nothing")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
