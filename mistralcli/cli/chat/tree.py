"""A conversation as a tree: every message has one before it, and may have several behind it.

It only ever grows. Where the talk goes on is a place in it (`at`), so taking back, editing and asking again are moves
to another place, and no answer is lost.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mistralcli.conversation import Message, Role


@dataclass(frozen=True)
class Node:
    """A message, and the index of the one before it, None for a first one.

    `unfinished`: an answer that was stopped or cut off.
    """

    message: Message
    parent: int | None = None
    unfinished: bool = False


@dataclass(frozen=True)
class Tree:
    """Messages in the order in which they came, each behind its parent; `at` is the last one of the present branch."""

    nodes: tuple[Node, ...] = ()
    at: int | None = None

    def add(self, message: Message, *, unfinished: bool = False) -> "Tree":
        """The tree with a message behind the present place, which is the new place."""
        return Tree((*self.nodes, Node(message, self.at, unfinished)), len(self.nodes))

    def put(self, message: Message, *, unfinished: bool = False) -> "Tree":
        """At that message behind the present place, which is added unless it is there already."""
        for index, node in enumerate(self.nodes):
            if node == Node(message, self.at, unfinished):
                return self.move(index)
        return self.add(message, unfinished=unfinished)

    def move(self, index: int | None) -> "Tree":
        return replace(self, at=index)

    def back(self) -> "Tree":
        """At the message before the present one."""
        return self.move(None if self.last is None else self.last.parent)

    @property
    def last(self) -> Node | None:
        """The message at the present place."""
        return None if self.at is None else self.nodes[self.at]

    @property
    def last_role(self) -> Role | None:
        return None if self.last is None else self.last.message.role

    def path(self, index: int | None = None) -> tuple[int, ...]:
        """The messages from the first to that one (without it: to the present place), by index."""
        index = self.at if index is None else index
        found: list[int] = []
        while index is not None:
            found.append(index)
            index = self.nodes[index].parent
        return tuple(reversed(found))

    def messages(self) -> tuple[Message, ...]:
        """Those of the present branch."""
        return tuple(self.nodes[index].message for index in self.path())

    def leaves(self) -> list[int]:
        """The last message of every branch. What is added to a branch does not change the order."""
        return list(self._leaves_behind(self._children()))

    def _children(self) -> dict[int | None, list[int]]:
        children: dict[int | None, list[int]] = {}
        for index, node in enumerate(self.nodes):
            children.setdefault(node.parent, []).append(index)
        return children

    def _leaves_behind(self, children: dict[int | None, list[int]]) -> Iterator[int]:
        waiting = children.get(None, [])[::-1]
        while waiting:
            index = waiting.pop()
            if index not in children:
                yield index
            waiting += children.get(index, [])[::-1]
