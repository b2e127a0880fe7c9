//! Which of the words that are known somebody meant who wrote another.

use strsim::osa_distance;

/// The candidate most like `word`, if it is like it at all: at most a third of its letters differ.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = candidates.into_iter().map(|candidate| (osa_distance(word, candidate), candidate));
    let (differences, candidate) = near.min()?;
    (differences <= candidate.len().max(3) / 3).then_some(candidate)
}

/// What is told to whoever wrote `word` where one of `known` belongs: `expected mesh, local or off; did
/// you mean 'mesh'?`.
pub fn expected_one_of(word: &str, known: &[&str]) -> String {
    let all = match known {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => known.join(""),
    };
    match nearest(word, known.iter().copied()) {
        Some(near) => format!("expected {all}; did you mean '{near}'?"),
        None => format!("expected {all}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_slips_is_told_all_words_and_the_nearest() {
        assert_eq!(
            nearest("nmae", ["to", "name"]),
            Some("name"),
            "two letters swapped are one slip"
        );
        let known = ["mesh", "local", "off"];
        let told = expected_one_of("mash", &known);
        assert_eq!(told, "expected mesh, local or off; did you mean 'mesh'?");
        assert_eq!(expected_one_of("colour", &known), "expected mesh, local or off");
        assert_eq!(expected_one_of("x", &["v2"]), "expected v2");
    }
}
