"""The questions by which the text encoder learns the meaning of captions."""

from tools.demo_model.scenes import COLORS, POSITIONS, SHAPES, SIZES, Scene

QUESTIONS: dict[str, list[str | None]] = {
    "background": [None, *COLORS],
    "first shape": [None, *SHAPES],
    "first color": [None, *COLORS],
    "second shape": [None, *SHAPES],
    "second color": [None, *COLORS],
    "size": [None, *SIZES],
    "position": [None, *POSITIONS],
    "relation": [None, "left of", "above"],
}
"""Questions about a caption with their answers; ``None`` where the caption leaves it open."""


def answer_questions(scene: Scene, text: str) -> dict[str, str | None]:
    """Answer the `QUESTIONS` for a caption of the scene, which may be empty."""
    if not text:
        return dict.fromkeys(QUESTIONS)
    first, second = scene.objects[0], scene.objects[1] if len(scene.objects) > 1 else None
    return {
        "background": scene.background
        if scene.background in text.replace(",", " ").split()
        else None,
        "first shape": first.shape,
        "first color": first.color,
        "second shape": second.shape if second else None,
        "second color": second.color if second else None,
        "size": scene.size,
        "position": scene.position,
        "relation": scene.relation,
    }
