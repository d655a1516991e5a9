"""The exercises of the notebooks, and the instant checks of their answers.

    from helpers.course.exercises import check, freeze, hint, solution

    freeze("03", engine=engine)      # once, before the first exercise: what the answers are checked against
    check("03.1", answer)            # right; or yours beside what is expected of it, and a hint; None is open
    hint("03.1")                     # a hint without a try
    solution("03.1")                 # one that is right, with the reason

pages/ has a page for each notebook with the words of its exercises: title, what is expected, hints, a right answer with
the reason. A module has the judges of the answers.
"""

from __future__ import annotations

from helpers.course.exercises.frame import check, freeze, hint, solution

__all__ = ["check", "freeze", "hint", "solution"]
