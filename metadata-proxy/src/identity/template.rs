//! Session names and tags by template: `{container.name}-{container.id:12}`.

use super::{options::UNCLEAR, origin};
use crate::containers::Container;

/// What a template becomes: which characters STS takes in it, and how many.
///
/// Grammar: AWS STS API Reference, AssumeRole, `RoleSessionName` and `Tag`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    SessionName,
    TagValue,
}

impl Kind {
    fn allows(self, c: char) -> bool {
        match self {
            Self::SessionName => c.is_ascii_alphanumeric() || "_+=,.@-".contains(c),
            Self::TagValue => c.is_alphanumeric() || " _.:/=+-@".contains(c),
        }
    }

    fn limit(self) -> usize {
        match self {
            Self::SessionName => 64,
            Self::TagValue => 256,
        }
    }
}

/// Parsed, so that its mistakes show when it is given and not when it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Template {
    kind: Kind,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(String),
    Value { field: Field, at_most: usize },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Field {
    /// One of `NAMES`.
    Named(&'static str),
    Label(String),
    Variable(String),
}

const NAMES: [&str; 9] = [
    "container.name",
    "container.id",
    "image",
    "compose.project",
    "compose.service",
    "ecs.task",
    "ecs.family",
    "host",
    "service.unit",
];

const ID: Field = Field::Named("container.id");

impl Field {
    fn parse(text: &str) -> Result<Self, String> {
        if let Some(known) = NAMES.into_iter().find(|known| *known == text) {
            return Ok(Self::Named(known));
        }
        match text.split_once('.') {
            Some(("label", name)) if !name.is_empty() => Ok(Self::Label(name.to_owned())),
            Some(("env", name)) if !name.is_empty() => Ok(Self::Variable(name.to_owned())),
            _ => {
                let known = NAMES.join("}, {");
                Err(format!("there is no {{{text}}}, only {{{known}}}, {{label.NAME}}, {{env.NAME}}"))
            }
        }
    }

    /// The label that it is, or is taken from.
    fn label(&self) -> Option<&str> {
        match self {
            Self::Label(name) => Some(name),
            Self::Named("compose.project") => Some("com.docker.compose.project"),
            Self::Named("compose.service") => Some("com.docker.compose.service"),
            Self::Named("ecs.task") => Some("com.amazonaws.ecs.task-arn"),
            Self::Named("ecs.family") => Some("com.amazonaws.ecs.task-definition-family"),
            Self::Named(_) | Self::Variable(_) => None,
        }
    }

    fn value<'a>(&self, container: &'a Container, host: &'a str) -> &'a str {
        let label = self.label().and_then(|name| origin::label(container, name)).unwrap_or_default();
        match self {
            Self::Variable(name) => container.env.get(name).map(String::as_str).unwrap_or_default(),
            Self::Named("container.name") => &container.name,
            Self::Named("container.id") => &container.id,
            Self::Named("service.unit") if container.service => &container.name,
            Self::Named("image") => &container.image,
            Self::Named("host") => host,
            // The id at the end of the ARN.
            Self::Named("ecs.task") => label.rsplit('/').next().unwrap_or_default(),
            Self::Label(_) | Self::Named(_) => label,
        }
    }

    /// Why nobody can tell what it stands for.
    fn unclear(&self, container: &Container) -> Option<String> {
        let label = self.label().filter(|name| origin::unclear_label(container, name).is_some());
        match self {
            Self::Variable(name) if container.repeats(name) => {
                Some(format!("environment variable {name} is there more than once"))
            }
            Self::Variable(name) if origin::image_variable(container, name).is_some() => {
                Some(format!("environment variable {name} is the image's, too: {UNCLEAR}"))
            }
            _ => label.map(|name| format!("label {name} is the image's, too: {UNCLEAR}")),
        }
    }
}

impl Template {
    pub(crate) fn parse(kind: Kind, text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((literal, behind)) = rest.split_once('{') {
            let (field, behind) = behind.split_once('}').ok_or("a { without its }")?;
            parts.push(Part::Literal(literal.to_owned()));
            parts.push(field_part(kind, field)?);
            rest = behind;
        }
        parts.push(Part::Literal(rest.to_owned()));
        let literals = parts.iter().filter_map(|part| match part {
            Part::Literal(text) => Some(text),
            Part::Value { .. } => None,
        });
        if let Some(c) = literals.flat_map(|text| text.chars()).find(|c| !kind.allows(*c)) {
            return Err(format!("AWS does not take the character {c:?} there"));
        }
        Ok(Self { kind, parts })
    }

    pub(super) fn looks_at(&self, variable: &str) -> bool {
        let is_it = |field: &Field| matches!(field, Field::Variable(name) if name == variable);
        self.parts.iter().any(|part| matches!(part, Part::Value { field, .. } if is_it(field)))
    }

    /// Why nobody can tell what it becomes, if so.
    pub(super) fn unclear(&self, container: &Container) -> Option<String> {
        self.parts.iter().find_map(|part| match part {
            Part::Literal(_) => None,
            Part::Value { field, .. } => field.unclear(container),
        })
    }

    /// Characters of values that STS refuses become `-`. What is too long loses characters where most
    /// are, but never of the id.
    pub(crate) fn render(&self, container: &Container, host: &str) -> String {
        let limit = self.kind.limit();
        let allowed = |c| if self.kind.allows(c) { c } else { '-' };
        let mut texts: Vec<(bool, Vec<char>)> = Vec::new();
        for part in &self.parts {
            texts.push(match part {
                Part::Literal(text) => (false, text.chars().collect()),
                Part::Value { field, at_most } => {
                    let value = field.value(container, host).chars().take(limit.min(*at_most));
                    (*field != ID, value.map(allowed).collect())
                }
            });
        }
        let length: usize = texts.iter().map(|(_, text)| text.len()).sum();
        for _ in limit..length {
            let longest = texts.iter_mut().filter(|(may_lose, _)| *may_lose).max_by_key(|(_, text)| text.len());
            if let Some((_, text)) = longest {
                text.pop();
            }
        }
        texts.into_iter().flat_map(|(_, text)| text).take(limit).collect()
    }
}

/// `name` or `name:length`.
fn field_part(kind: Kind, text: &str) -> Result<Part, String> {
    let (name, length) = text.split_once(':').map_or((text, None), |(name, length)| (name, Some(length)));
    let field = Field::parse(name)?;
    let at_most = match length.map(str::parse) {
        None => kind.limit(),
        Some(Ok(length)) if length > 0 => length,
        Some(_) => return Err(format!("{{{text}}}: behind the colon stands how many characters to keep")),
    };
    Ok(Part::Value { field, at_most })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::tests::container;

    fn rendered(kind: Kind, text: &str, name: &str) -> String {
        let labels = [
            ("com.docker.compose.project", "shop"),
            ("com.docker.compose.service", "web"),
            ("com.amazonaws.ecs.task-arn", "arn:aws:ecs:eu-west-1:123456789012:task/prod/0123abcd"),
            ("com.amazonaws.ecs.task-definition-family", "family"),
        ];
        Template::parse(kind, text).unwrap().render(&container(name, &labels, &[("WHO", "me")]), "host-1")
    }

    #[test]
    fn every_value_has_its_place() {
        let name = |text| rendered(Kind::SessionName, text, "web");
        assert_eq!(name("{container.name}-{container.id:12}"), "web-0123456789ab");
        assert_eq!(name("{compose.project}.{compose.service}@{host}"), "shop.web@host-1");
        assert_eq!(name("{ecs.family}-{ecs.task}"), "family-0123abcd");
        assert_eq!(name("{container.id}"), "0123456789abcdef".repeat(4));
        assert_eq!(name("{label.com.docker.compose.service:2}-{env.WHO}-{label.none}{env.none}"), "we-me-");
        assert_eq!(name("{image}"), "registry-app-1.2");
        assert_eq!(rendered(Kind::TagValue, "by {image}", "web"), "by registry/app:1.2");
    }

    #[test]
    fn what_sts_refuses_is_replaced_and_what_is_too_long_is_cut_but_never_the_id() {
        let name = |name| rendered(Kind::SessionName, "{container.name}-{container.id:12}", name);
        assert_eq!(name("we b/é"), "we-b---0123456789ab");
        let long = name(&"x".repeat(300));
        assert_eq!(long.len(), 64);
        assert!(long.ends_with("x-0123456789ab"));
        assert_eq!(rendered(Kind::SessionName, "a-{container.id}", "web").len(), 64);
        assert_eq!(rendered(Kind::TagValue, "{container.name}{container.name}", &"é".repeat(300)), "é".repeat(256));
    }

    #[test]
    fn a_mistake_is_named() {
        for (text, expected) in [
            ("{container}", "there is no {container}, only {container.name}, "),
            ("{image", "a { without its }"),
            ("{label.}", "there is no {label.}, only "),
            ("{container.id:x}", "how many characters"),
            ("{container.id:0}", "how many characters"),
            ("a/b", "the character '/'"),
            ("a}", "the character '}'"),
        ] {
            let error = Template::parse(Kind::SessionName, text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
