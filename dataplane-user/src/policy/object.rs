//! Istio's objects, `AuthorizationPolicy` and `PeerAuthentication`, read from their JSON.
//!
//! Read by hand and not by serde, because what a policy says and this reader does not understand must not be passed
//! over: an ALLOW rule with it never matches, a DENY rule matches without it (as istiod does with HTTP attributes). Every
//! mistake is told with its path, and what the object means at its most careful is kept beside it, for when there is no
//! earlier version that was good.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Map, Value};

use super::{
    mtls::{Mode, PeerAuthentication},
    rule::{Action, Authorization, Clause, Match, Rule, Scope},
    values::{Cidr, ServiceAccount, StringMatch},
};

/// The API group of both kinds; any version of it.
pub const GROUP: &str = "security.istio.io/";
/// `"true"`: the policy is tried out.
const DRY_RUN: &str = "istio.io/dry-run";
/// Mistakes of one object that are told in full.
const TOLD: usize = 3;
/// More than etcd takes in one object.
const MAX_VALUES: usize = 65_536;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    AuthorizationPolicy,
    PeerAuthentication,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::PeerAuthentication => "PeerAuthentication",
        }
    }
}

/// What names an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub kind: Kind,
    /// namespace/name
    pub name: Arc<str>,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.kind.name(), self.name)
    }
}

/// An object that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    pub key: Key,
    pub body: Body,
    /// In force, but not as it reads: what is enforced instead.
    pub warnings: Vec<String>,
}

/// A policy that is in Istio's own form already (workload discovery).
impl From<Authorization> for Parsed {
    fn from(policy: Authorization) -> Self {
        let name = format!("{}/{}", policy.namespace, policy.name).into();
        let key = Key { kind: Kind::AuthorizationPolicy, name };
        Self { key, body: Body::Authorization(policy), warnings: Vec::new() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    Authorization(Authorization),
    Peer(PeerAuthentication),
    /// Well formed, and not for an L4 node dataplane; why.
    Skipped(String),
    Malformed {
        reason: String,
        /// The object at its most careful, when it can be told which workloads it is for.
        closed: Option<Box<Body>>,
    },
}

/// What a document turns out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    Policy(Box<Parsed>),
    /// Another kind of object, such as `apps/v1 Deployment`.
    Other(String),
    /// It has no usable name; why.
    Unnamed(String),
}

/// Reads one object of whatever kind.
pub fn read(object: &Value) -> Read {
    let text = |field: &str| object.get(field).and_then(Value::as_str).unwrap_or_default();
    let (version, kind) = (text("apiVersion"), text("kind"));
    let kind = match kind {
        _ if !version.starts_with(GROUP) => return Read::Other(shown(&format!("{version} {kind}"))),
        "AuthorizationPolicy" => Kind::AuthorizationPolicy,
        "PeerAuthentication" => Kind::PeerAuthentication,
        _ => return Read::Other(shown(&format!("{version} {kind}"))),
    };
    read_as(kind, object)
}

/// Reads an object whose kind is known: items of a list from the API do not say it.
pub fn read_as(kind: Kind, object: &Value) -> Read {
    let meta = |field: &str| object.pointer(&format!("/metadata/{field}")).and_then(Value::as_str);
    let name = |field: &'static str| match meta(field) {
        Some(name) if is_name(name) => Ok(Arc::<str>::from(name)),
        Some(name) => Err(format!("{}: metadata.{field} {:?} is no name", kind.name(), shown(name))),
        None => Err(format!("{}: metadata.{field} is missing", kind.name())),
    };
    let (namespace, name) = match (name("namespace"), name("name")) {
        (Ok(namespace), Ok(name)) => (namespace, name),
        (Err(reason), _) | (_, Err(reason)) => return Read::Unnamed(reason),
    };
    let key = Key { kind, name: format!("{namespace}/{name}").into() };
    let mut reader = Reader::default();
    let body = match kind {
        Kind::AuthorizationPolicy => reader.authorization(namespace, name, object),
        Kind::PeerAuthentication => reader.peer(namespace, name, object),
    };
    let body = match (reader.mistakes.is_empty(), body) {
        (true, Some(body)) => body,
        (_, closed) => Body::Malformed { reason: told(&reader.mistakes), closed: closed.map(Box::new) },
    };
    Read::Policy(Box::new(Parsed { key, body, warnings: reader.warnings }))
}

fn told(mistakes: &[String]) -> String {
    let mut reason = mistakes.iter().take(TOLD).map(String::as_str).collect::<Vec<_>>().join("; ");
    if mistakes.len() > TOLD {
        reason += &format!(" (and {} more)", mistakes.len() - TOLD);
    }
    reason
}

/// RFC 1123, read generously: what matters is that it can't be mistaken for another in a path or a message.
fn is_name(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    !name.is_empty() && name.len() <= 253 && name.bytes().all(fits)
}

/// What a message quotes is bounded.
fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

#[derive(Default)]
struct Reader {
    mistakes: Vec<String>,
    warnings: Vec<String>,
    values: usize,
}

/// What was found where something was expected.
fn found(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

type Labels = BTreeMap<Arc<str>, Arc<str>>;

impl Reader {
    fn mistake(&mut self, at: &str, what: impl std::fmt::Display) {
        self.mistakes.push(format!("{at}: {what}"));
    }

    /// A field that may be missing or null. `Err`: it is something else, and was told.
    fn object<'a>(
        &mut self,
        of: &'a Map<String, Value>,
        field: &str,
        at: &str,
    ) -> Result<Option<&'a Map<String, Value>>, ()> {
        match of.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => {
                self.mistake(&join(at, field), format_args!("{} where an object belongs", found(other)));
                Err(())
            }
        }
    }

    fn list<'a>(&mut self, of: &'a Map<String, Value>, field: &str, at: &str) -> Result<&'a [Value], ()> {
        match of.get(field) {
            None | Some(Value::Null) => Ok(&[]),
            Some(Value::Array(items)) => Ok(items),
            Some(other) => {
                self.mistake(&join(at, field), format_args!("{} where a list belongs", found(other)));
                Err(())
            }
        }
    }

    /// `spec`, which an object without rules may do without.
    fn spec<'a>(&mut self, object: &'a Value) -> Option<&'a Map<String, Value>> {
        static EMPTY: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
        match object.as_object() {
            Some(object) => self.object(object, "spec", "").ok().map(|spec| spec.unwrap_or(&EMPTY)),
            None => {
                self.mistake("object", format_args!("{} where an object belongs", found(object)));
                None
            }
        }
    }

    /// Fields that are not known are told, and what is known holds.
    fn others(&mut self, of: &Map<String, Value>, known: &[&str], at: &str) {
        for field in of.keys().filter(|field| !known.contains(&field.as_str())) {
            self.warnings.push(format!("{} is not known here and is passed over", join(at, &shown(field))));
        }
    }

    /// `Err`: it can't be told which workloads are meant.
    fn selector(&mut self, spec: &Map<String, Value>) -> Result<Option<Labels>, ()> {
        let at = "spec.selector";
        let Some(selector) = self.object(spec, "selector", "spec")? else { return Ok(None) };
        let mut ok = Ok(());
        for field in selector.keys().filter(|field| *field != "matchLabels") {
            // Passed over, it would select more than was meant.
            self.mistake(at, format_args!("{} is not known here: only matchLabels is", shown(field)));
            ok = Err(());
        }
        let mut labels = Labels::new();
        for (key, value) in self.object(selector, "matchLabels", at)?.into_iter().flatten() {
            match value.as_str() {
                Some(value) if !key.is_empty() && !key.contains('*') && !value.contains('*') => {
                    labels.insert(key.as_str().into(), value.into());
                }
                Some(_) => {
                    self.mistake(
                        at,
                        format_args!("label {:?}: empty, or with a wildcard, which is not for labels", shown(key)),
                    );
                    ok = Err(());
                }
                None => {
                    self.mistake(
                        at,
                        format_args!("label {:?}: {} where text belongs (put it in quotes)", shown(key), found(value)),
                    );
                    ok = Err(());
                }
            }
        }
        ok.map(|()| Some(labels))
    }

    fn authorization(&mut self, namespace: Arc<str>, name: Arc<str>, object: &Value) -> Option<Body> {
        const KNOWN: [&str; 6] = ["selector", "targetRef", "targetRefs", "rules", "action", "provider"];
        let spec = self.spec(object)?;
        self.others(spec, &KNOWN, "spec");
        let set = |field: &str| {
            spec.get(field).is_some_and(|value| !value.is_null() && value.as_array().is_none_or(|a| !a.is_empty()))
        };
        if set("targetRef") || set("targetRefs") {
            return Some(Body::Skipped("has targetRefs: it is for a waypoint, not for this node".into()));
        }
        let action = match spec.get("action") {
            None | Some(Value::Null) => Some(Action::Allow),
            Some(action) => match action.as_str() {
                Some("ALLOW") => Some(Action::Allow),
                Some("DENY") => Some(Action::Deny),
                Some(other @ ("AUDIT" | "CUSTOM")) => {
                    return Some(Body::Skipped(format!("action {other} is not supported at L4: it is not enforced")));
                }
                _ => {
                    self.mistake(
                        "spec.action",
                        format_args!("{} is neither ALLOW nor DENY", shown(&action.to_string())),
                    );
                    None
                }
            },
        };
        let scope = match self.selector(spec).ok()? {
            Some(labels) if !labels.is_empty() => Scope::Labels(labels),
            _ => Scope::Namespace,
        };
        // Allowing nothing is the most careful reading of what can't be read.
        let rules = match action {
            Some(action) => self.rules(spec, action, &namespace),
            None => Vec::new(),
        };
        let dry_run = self.dry_run(object);
        let action = action.unwrap_or(Action::Allow);
        if action == Action::Deny && rules.is_empty() {
            self.warnings.push("action DENY without rules never denies".into());
        }
        Some(Body::Authorization(Authorization { namespace, name, scope, action, dry_run, rules }))
    }

    fn dry_run(&mut self, object: &Value) -> bool {
        let annotations = object.pointer("/metadata/annotations").and_then(Value::as_object);
        // As Go's ParseBool reads it.
        match annotations.and_then(|annotations| annotations.get(DRY_RUN)).map(|value| value.as_str()) {
            None | Some(Some("false" | "0" | "f" | "F" | "FALSE" | "False")) => false,
            Some(Some("true" | "1" | "t" | "T" | "TRUE" | "True")) => true,
            Some(_) => {
                self.warnings
                    .push(format!("annotation {DRY_RUN} is neither \"true\" nor \"false\": the policy is enforced"));
                false
            }
        }
    }

    fn rules(&mut self, spec: &Map<String, Value>, action: Action, namespace: &Arc<str>) -> Vec<Rule> {
        let Ok(items) = self.list(spec, "rules", "spec") else {
            return if action == Action::Deny { vec![Rule::default()] } else { Vec::new() };
        };
        let mut rules = Vec::with_capacity(items.len().min(1024));
        for (index, item) in items.iter().enumerate() {
            let at = format!("spec.rules[{index}]");
            let mut rule = RuleReader { reader: self, namespace, rule: Rule::default() };
            match item {
                Value::Object(item) => rule.read(item, &at),
                other => rule.bad(&at, "", format_args!("{} where an object belongs", found(other))),
            }
            let rule = rule.rule;
            if !rule.unseen.is_empty() {
                let consequence = match action {
                    Action::Allow => "so this rule never allows",
                    Action::Deny => "so this rule denies all that its other fields match",
                };
                let unseen = rule.unseen.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
                self.warnings.push(format!("{at}: {unseen} cannot be enforced at L4, {consequence}"));
            }
            rules.push(rule);
        }
        rules
    }

    fn peer(&mut self, namespace: Arc<str>, name: Arc<str>, object: &Value) -> Option<Body> {
        let spec = self.spec(object)?;
        self.others(spec, &["selector", "mtls", "portLevelMtls"], "spec");
        let selector = self.selector(spec).ok()?;
        let mut mode = match self.object(spec, "mtls", "spec") {
            Ok(mtls) => mtls.and_then(|mtls| self.mode(mtls, "spec.mtls")),
            Err(()) => Some(Mode::Strict),
        };
        let mut ports = BTreeMap::new();
        let levels = self.object(spec, "portLevelMtls", "spec").unwrap_or_else(|()| {
            mode = Some(Mode::Strict);
            None
        });
        for (port, mtls) in levels.into_iter().flatten() {
            let at = format!("spec.portLevelMtls.{}", shown(port));
            let Some(port) = port_number(port) else {
                self.mistake(&at, "no port: ports are 1..=65535");
                continue;
            };
            let mode = match mtls {
                Value::Null => None,
                Value::Object(mtls) => self.mode(mtls, &at),
                other => {
                    self.mistake(&at, format_args!("{} where an object belongs", found(other)));
                    Some(Mode::Strict)
                }
            };
            ports.insert(port, mode);
        }
        if selector.as_ref().is_none_or(Labels::is_empty) && !ports.is_empty() {
            self.warnings.push("spec.portLevelMtls counts only beside a selector: it is passed over".into());
            ports.clear();
        }
        let created = object.pointer("/metadata/creationTimestamp").and_then(Value::as_str).unwrap_or_default().into();
        Some(Body::Peer(PeerAuthentication { namespace, name, created, selector, mode, ports }))
    }

    /// None: unset. What can't be read is strict.
    fn mode(&mut self, mtls: &Map<String, Value>, at: &str) -> Option<Mode> {
        self.others(mtls, &["mode"], at);
        match mtls.get("mode") {
            None | Some(Value::Null) => None,
            Some(mode) => match mode.as_str() {
                Some("UNSET") => None,
                Some("DISABLE") => Some(Mode::Disable),
                Some("PERMISSIVE") => Some(Mode::Permissive),
                Some("STRICT") => Some(Mode::Strict),
                _ => {
                    let mode = shown(&mode.to_string());
                    self.mistake(at, format_args!("mode {mode} is none of UNSET, DISABLE, PERMISSIVE, STRICT"));
                    Some(Mode::Strict)
                }
            },
        }
    }
}

fn join(at: &str, field: &str) -> String {
    if at.is_empty() { field.to_owned() } else { format!("{at}.{field}") }
}

fn port_number(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

/// Reads one rule. What it can't take over goes to `rule.unseen`, and the field with it.
struct RuleReader<'a> {
    reader: &'a mut Reader,
    namespace: &'a Arc<str>,
    rule: Rule,
}

impl RuleReader<'_> {
    /// A mistake, which also is something that this rule says and nobody sees.
    fn bad(&mut self, at: &str, field: &str, what: impl std::fmt::Display) {
        self.reader.mistake(&join(at, field), what);
        self.rule.unseen.push(join(relative(at), field));
    }

    fn unseen(&mut self, at: &str, field: &str) {
        self.rule.unseen.push(join(relative(at), &shown(field)));
    }

    fn read(&mut self, item: &Map<String, Value>, at: &str) {
        const KNOWN: [&str; 3] = ["from", "to", "when"];
        for field in item.keys().filter(|field| !KNOWN.contains(&field.as_str())) {
            self.unseen(at, field);
        }
        self.alternatives(item, at, "from", "source", Self::source);
        self.alternatives(item, at, "to", "operation", Self::operation);
        let when = self.reader.list(item, "when", at).unwrap_or_else(|()| {
            self.unseen(at, "when");
            &[]
        });
        for (index, condition) in when.iter().enumerate() {
            let at = format!("{at}.when[{index}]");
            match condition {
                Value::Object(condition) => self.condition(condition, &at, index),
                other => self.bad(&at, "", format_args!("{} where an object belongs", found(other))),
            }
        }
    }

    /// `from` and `to`: lists of which any may match.
    fn alternatives(
        &mut self,
        item: &Map<String, Value>,
        at: &str,
        list: &str,
        inner: &str,
        read: fn(&mut Self, &Map<String, Value>, &str) -> Match,
    ) {
        let Ok(items) = self.reader.list(item, list, at) else { return self.unseen(at, list) };
        let mut matches = Vec::with_capacity(items.len().min(1024));
        for (index, item) in items.iter().enumerate() {
            let at = format!("{at}.{list}[{index}]");
            let Value::Object(item) = item else {
                self.bad(&at, "", format_args!("{} where an object belongs", found(item)));
                matches.push(Match::default());
                continue;
            };
            for field in item.keys().filter(|field| *field != inner) {
                self.unseen(&at, field);
            }
            let said = match self.reader.object(item, inner, &at) {
                Ok(Some(said)) => {
                    let at = join(&at, inner);
                    if said.is_empty() {
                        self.reader.warnings.push(format!("{at} says nothing: it never allows, and denies everything"));
                    }
                    read(self, said, &at)
                }
                Ok(None) => {
                    self.bad(&at, inner, "is missing");
                    Match::default()
                }
                Err(()) => {
                    self.unseen(&at, inner);
                    Match::default()
                }
            };
            matches.push(said);
        }
        if !matches.is_empty() {
            self.rule.clauses.push(Clause { of: list.into(), matches });
        }
    }

    fn source(&mut self, source: &Map<String, Value>, at: &str) -> Match {
        let mut said = Match::default();
        for (field, value) in source {
            match field.as_str() {
                "principals" => said.principals = self.principals(value, at, field),
                "notPrincipals" => said.not_principals = self.principals(value, at, field),
                "namespaces" => said.namespaces = self.names(value, at, field),
                "notNamespaces" => said.not_namespaces = self.names(value, at, field),
                "serviceAccounts" => said.service_accounts = self.accounts(value, at, field),
                "notServiceAccounts" => said.not_service_accounts = self.accounts(value, at, field),
                "ipBlocks" => said.source_ips = self.nets(value, at, field),
                "notIpBlocks" => said.not_source_ips = self.nets(value, at, field),
                // requestPrincipals, remoteIpBlocks, and whatever else may come.
                _ if says_nothing(value) => {}
                _ => self.unseen(at, field),
            }
        }
        said
    }

    fn operation(&mut self, operation: &Map<String, Value>, at: &str) -> Match {
        let mut said = Match::default();
        for (field, value) in operation {
            match field.as_str() {
                "ports" => said.destination_ports = self.ports(value, at, field),
                "notPorts" => said.not_destination_ports = self.ports(value, at, field),
                // hosts, methods, paths, and whatever else may come.
                _ if says_nothing(value) => {}
                _ => self.unseen(at, field),
            }
        }
        said
    }

    fn condition(&mut self, condition: &Map<String, Value>, at: &str, index: usize) {
        let key = match condition.get("key").and_then(Value::as_str) {
            Some(key) if !key.is_empty() => key,
            _ => return self.bad(at, "key", "is missing"),
        };
        for field in condition.keys().filter(|field| !["key", "values", "notValues"].contains(&field.as_str())) {
            self.unseen(at, field);
        }
        let none = Value::Null;
        let values = |field| condition.get(field).unwrap_or(&none);
        let (yes, no) = (values("values"), values("notValues"));
        if says_nothing(yes) && says_nothing(no) {
            return self.bad(at, "values", "neither values nor notValues is given");
        }
        let mut said = Match::default();
        for (negated, value) in [(false, yes), (true, no)] {
            let field = if negated { "notValues" } else { "values" };
            match (key, negated) {
                ("source.ip", false) => said.source_ips = self.nets(value, at, field),
                ("source.ip", true) => said.not_source_ips = self.nets(value, at, field),
                ("source.namespace", false) => said.namespaces = self.names(value, at, field),
                ("source.namespace", true) => said.not_namespaces = self.names(value, at, field),
                ("source.principal", false) => said.principals = self.principals(value, at, field),
                ("source.principal", true) => said.not_principals = self.principals(value, at, field),
                ("source.serviceAccount", false) => said.service_accounts = self.accounts(value, at, field),
                ("source.serviceAccount", true) => said.not_service_accounts = self.accounts(value, at, field),
                ("destination.ip", false) => said.destination_ips = self.nets(value, at, field),
                ("destination.ip", true) => said.not_destination_ips = self.nets(value, at, field),
                ("destination.port", false) => said.destination_ports = self.ports(value, at, field),
                ("destination.port", true) => said.not_destination_ports = self.ports(value, at, field),
                _ => return self.unseen(at, key),
            }
        }
        self.rule.clauses.push(Clause { of: format!("when[{index}] {key}").into(), matches: vec![said] });
    }

    /// All values of a field; none when one of them is wrong, so that a DENY rule goes on without the field.
    fn values<T>(&mut self, value: &Value, at: &str, field: &str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let items = match value {
            Value::Null => return Vec::new(),
            Value::Array(items) => items,
            other => {
                self.bad(at, field, format_args!("{} where a list belongs", found(other)));
                return Vec::new();
            }
        };
        self.reader.values += items.len();
        if self.reader.values > MAX_VALUES {
            self.bad(at, field, format_args!("more than {MAX_VALUES} values in one object: split it"));
            return Vec::new();
        }
        let mut read = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let number;
            let text = match item {
                Value::String(text) => text,
                // Ports without quotes, as people write them in files.
                Value::Number(digits) => {
                    number = digits.to_string();
                    &number
                }
                other => {
                    self.bad(at, &format!("{field}[{index}]"), format_args!("{} where text belongs", found(other)));
                    return Vec::new();
                }
            };
            match parse(text) {
                Ok(value) => read.push(value),
                Err(reason) => {
                    self.bad(at, &format!("{field}[{index}]"), reason);
                    return Vec::new();
                }
            }
        }
        read
    }

    fn principals(&mut self, value: &Value, at: &str, field: &str) -> Vec<StringMatch> {
        self.values(value, at, field, |text| match text.strip_prefix("spiffe://") {
            Some(rest) => Err(format!("principals go without spiffe://: write {:?}", shown(rest))),
            None => name(text),
        })
    }

    fn names(&mut self, value: &Value, at: &str, field: &str) -> Vec<StringMatch> {
        self.values(value, at, field, name)
    }

    fn accounts(&mut self, value: &Value, at: &str, field: &str) -> Vec<ServiceAccount> {
        let here = self.namespace.clone();
        self.values(value, at, field, |text| {
            let (namespace, account) = match text.split_once('/') {
                Some((namespace, account)) => (namespace.into(), account),
                None => (here.clone(), text),
            };
            if !is_name(&namespace) || !is_name(account) {
                return Err(format!("{:?} is neither namespace/name nor the name of a service account", shown(text)));
            }
            Ok(ServiceAccount { namespace, name: account.into() })
        })
    }

    fn nets(&mut self, value: &Value, at: &str, field: &str) -> Vec<Cidr> {
        self.values(value, at, field, |text| text.parse().map_err(|error: super::values::BadCidr| error.to_string()))
    }

    fn ports(&mut self, value: &Value, at: &str, field: &str) -> Vec<u16> {
        self.values(value, at, field, |text| {
            port_number(text).ok_or_else(|| format!("{:?} is no port: ports are 1..=65535", shown(text)))
        })
    }
}

fn name(text: &str) -> Result<StringMatch, String> {
    if text.is_empty() { Err("is empty".into()) } else { Ok(StringMatch::parse(text)) }
}

/// An empty list is the same as none, as protobuf has it.
fn says_nothing(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}

/// `spec.rules[0].to[1].operation` within its rule: `to[1].operation`.
fn relative(at: &str) -> &str {
    at.strip_prefix("spec.rules[")
        .and_then(|rest| rest.split_once(']'))
        .map_or(at, |(_, rest)| rest.trim_start_matches('.'))
}
