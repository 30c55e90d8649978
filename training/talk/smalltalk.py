"""Greetings, thanks, feelings, favorites, jokes, verses, and what the model says about itself."""

from functools import cache
from random import Random

from training.talk.noise import finished, noisy, terse
from training.talk.templates import (
    Block,
    Turn,
    Turns,
    blocks,
    capital,
    chance,
    fill,
    n_expansions,
    pairs,
    pick,
    say,
    sections,
)


def exchange(rng: Random, block: Block) -> Turn:
    """One question of `block` and one of its answers."""
    question, answer = fill(rng, pick(rng, block["Q"])), fill(rng, pick(rng, block["A"]))
    return finished(question) if chance(rng, 0.5) else question, answer


def reply(rng: Random, block: Block) -> Turn:
    """As `exchange`, at the beginning of a talk."""
    question, answer = exchange(rng, block)
    return noisy(rng, question), answer


@cache
def _weighted(name: str) -> tuple[Block, ...]:
    """Blocks with questions; those with more phrasings come up more often, up to four times."""
    found: list[Block] = []
    for block in blocks(name):
        if block["Q"]:
            found += [block] * min(4, 1 + sum(map(n_expansions, block["Q"])) // 16)
    return tuple(found)


def small_talk(rng: Random) -> Turns:
    return [reply(rng, pick(rng, _weighted("smalltalk.txt")))]


def about(rng: Random) -> Turns:
    return [reply(rng, pick(rng, _weighted("about.txt")))]


@cache
def tagged(name: str, tag: str) -> Block:
    return next(block for block in blocks(name) if block.tag == tag)


def said(rng: Random, tag: str) -> Turn:
    """One exchange from the block `tag` of smalltalk.txt, in the middle of a talk."""
    question, answer = exchange(rng, tagged("smalltalk.txt", tag))
    return terse(rng, question), answer


def _feeling_turn(rng: Random, block: Block, word: str) -> tuple[str, str, str]:
    """What the user says, what the model says, and the reason (as "your cat is ill"), if there is one."""
    if chance(rng, 0.5):
        user = finished(say(rng, "smalltalk feel", {"f": word}))
        return noisy(rng, user), fill(rng, pick(rng, block["A"])), ""
    mine, _, yours = pick(rng, block["R"]).partition(" => ")
    user = finished(say(rng, "smalltalk feel because", {"f": word, "r": mine, "R": capital(mine)}))
    return noisy(rng, user), fill(rng, pick(rng, block["O"]), {"reason": yours}), yours


def feelings(rng: Random) -> Turns:
    """A feeling, perhaps with a reason; then perhaps advice, a look back at the reason, or thanks."""
    block = pick(rng, blocks("feelings.txt"))
    word = pick(rng, block["F"][0].split(", "))
    user, answer, reason = _feeling_turn(rng, block, word)
    turns = [(user, answer)]
    if chance(rng, 0.4):
        turns.append((terse(rng, say(rng, f"smalltalk advice {block['S'][0]}")), pick(rng, block["D"])))
    if reason and chance(rng, 0.35):
        question = say(rng, "smalltalk why feel", {"f": word})
        turns.append((terse(rng, question), f"You are {word} because {reason}."))
    if len(turns) > 1 and chance(rng, 0.3):
        turns.append(said(rng, "thanks"))
    return turns


def favorites(rng: Random) -> Turns:
    block = pick(rng, blocks("favorites.txt"))
    word = pick(rng, block["W"][0].split(" | "))
    question = finished(say(rng, "smalltalk favorite", {"w": word}))
    return [(noisy(rng, question), pick(rng, block["A"]))]


@cache
def _jokes(kind: str) -> tuple[tuple[str, str], ...]:
    found = [(left, right) for left, right in pairs("jokes.txt") if left.startswith(kind)]
    return tuple((left.removeprefix(kind), right) for left, right in found)


def _told_at_once(rng: Random, request: str, joke: tuple[str, str]) -> Turns:
    return [(request, f"{joke[0]} {joke[1]}")]


def _told_in_two(rng: Random, request: str, joke: tuple[str, str]) -> Turns:
    again = pick(rng, ("Why?", "I don't know. Why?", "Why?", "Tell me!")) if joke[0].startswith("Why") else ""
    answer = again or terse(rng, finished(say(rng, "smalltalk give up")))
    return [(request, joke[0]), (answer, joke[1])]


def jokes(rng: Random) -> Turns:
    """One to three jokes or riddles; a riddle waits for an answer."""
    is_riddle = chance(rng, 0.4)
    kind, word = ("R: ", "riddle") if is_riddle else ("J: ", "joke")
    tell = _told_in_two if is_riddle or chance(rng, 0.2) else _told_at_once
    turns: Turns = []
    chosen = rng.sample(_jokes(kind), pick(rng, (1, 1, 2, 3)))
    for joke in chosen:
        request = say(rng, "smalltalk another" if turns else f"smalltalk {word}", {"w": word})
        turns += tell(rng, (terse if turns else noisy)(rng, finished(request)), joke)
    if chance(rng, 0.15):
        turns.append(said(rng, "laugh"))
    return turns


def _poem(rng: Random, name: str, kind: str) -> Turns:
    """A verse of the file `name` on its subject, or on any where none is asked for."""
    block = pick(rng, blocks(name))
    subject = pick(rng, block["V"][0].split(" | "))
    heading = f"smalltalk {kind}" if chance(rng, 0.65) else f"smalltalk any {kind}"
    request = noisy(rng, finished(say(rng, heading, {"v": subject})))
    return [(request, "\n".join(block.items))]


def _unknown_subject(rng: Random) -> Turns:
    """A poem about something else, and says so."""
    block, asked = pick(rng, blocks("verses.txt")), pick(rng, sections("phrases.txt")["smalltalk subjects"])
    request = noisy(rng, finished(say(rng, "smalltalk verse", {"v": asked})))
    known = pick(rng, block["V"][0].split(" | "))
    intro = say(rng, "smalltalk other verse", {"v": asked, "k": known})
    return [(request, intro + "\n" + "\n".join(block.items))]


def verses(rng: Random) -> Turns:
    """A verse, a haiku or a limerick."""
    roll = rng.random()
    if roll < 0.08:
        return _unknown_subject(rng)
    if roll < 0.68:
        return _poem(rng, "verses.txt", "verse")
    return _poem(rng, "haikus.txt", "haiku") if roll < 0.88 else _poem(rng, "limericks.txt", "limerick")


def curious(rng: Random) -> Turns:
    """One to three small facts for those who ask to be told something."""
    facts = rng.sample(sections("curious.txt")[""], pick(rng, (1, 1, 2, 3)))
    turns: Turns = []
    for fact in facts:
        request = say(rng, "smalltalk another" if turns else "smalltalk fact", {"w": "fact"})
        shown = fact if chance(rng, 0.6) else say(rng, "smalltalk fact answers", {"x": fact})
        turns.append(((terse if turns else noisy)(rng, finished(request)), shown))
    return turns
