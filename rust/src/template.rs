//! Chat templates: Jinja as transformers configures it (utils/chat_template_utils.py), through minijinja.

use crate::*;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};
use std::fmt::Write;

/// Work of one render, in units of minijinja (an instruction, or 64 bytes): ends a runaway template after about two seconds.
const FUEL: u64 = 10_000_000;
/// A render runs on a stack of its own, so that deep values and recursion cannot exhaust that of an unknown caller.
const STACK_BYTES: usize = 256 << 20;
const MAX_DEPTH: usize = 512;

pub struct MlxlmTemplate(Environment<'static>);

/// Marks an error made by raise_exception.
#[derive(Debug)]
struct Raised(String);
impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Raised {}

fn operation(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

// --- values as Python shows them ---------------------------------------------------------------------------------------------------

fn python_float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf".into() } else { "-inf".into() };
    }
    if value != 0.0 && !(1e-4..1e16).contains(&value.abs()) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        return format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs());
    }
    format!("{value:?}")
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => python_float(float),
        _ => value.to_string(),
    }
}

fn python_quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || c as u32 == 0x7f => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

fn python_repr(value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(operation("value is nested too deeply"));
    }
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => python_quoted(value.as_str().unwrap_or(""), out),
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                python_repr(&key, out, depth + 1)?;
                out.push_str(": ");
                python_repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        ValueKind::Seq => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                python_repr(&item, out, depth + 1)?;
            }
            out.push_str(if value.is_tuple() && value.len() == Some(1) { "," } else { "" });
            out.push(close);
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

fn python_str(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::String => out.push_str(value.as_str().unwrap_or("")),
        _ => python_repr(value, &mut out, 0)?,
    }
    Ok(out)
}

// --- tojson: json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) ------------------------------------

struct Dump<'a> {
    out: String,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    ensure_ascii: bool,
    state: &'a State<'a, 'a>,
    paid_bytes: usize,
}

impl Dump<'_> {
    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 || self.ensure_ascii && !c.is_ascii() => {
                    let mut units = [0u16; 2];
                    for unit in c.encode_utf16(&mut units) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or("")),
            ValueKind::None => self.string("null"),
            ValueKind::Bool => self.string(if key.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.string(&number(key)),
            kind => return Err(operation(format!("tojson: a key is a {kind}, wanted a string"))),
        }
        Ok(())
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(operation("tojson: value is nested too deeply"));
        }
        if self.out.len() >= self.paid_bytes + 4096 {
            self.state.consume_fuel(((self.out.len() - self.paid_bytes) / 64) as u64)?;
            self.paid_bytes = self.out.len();
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let text = number(value).replace("inf", "Infinity").replace("nan", "NaN");
                self.out.push_str(&text);
            }
            ValueKind::String => self.string(value.as_str().unwrap_or("")),
            ValueKind::Map => self.map(value, depth)?,
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            kind => return Err(operation(format!("tojson: Object of type {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        self.out.push('{');
        for (index, key) in keys.iter().enumerate() {
            if index > 0 {
                self.out.push_str(&self.item_separator);
            }
            self.new_line(depth + 1);
            self.key(key)?;
            self.out.push_str(&self.key_separator);
            self.value(&value.get_item(key)?, depth + 1)?;
        }
        if !keys.is_empty() {
            self.new_line(depth);
        }
        self.out.push('}');
        Ok(())
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut empty = true;
        for item in value.try_iter()? {
            if !empty {
                self.out.push_str(&self.item_separator);
            }
            empty = false;
            self.new_line(depth + 1);
            self.value(&item, depth + 1)?;
        }
        if !empty {
            self.new_line(depth);
        }
        self.out.push(']');
        Ok(())
    }
}

fn tojson(state: &State, value: &Value, ensure_ascii: Option<bool>, kwargs: Kwargs) -> Result<String, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        Some(v) if v.is_integer() => Some(" ".repeat(usize::try_from(v).unwrap_or(0).min(64))),
        Some(v) => v.as_str().map(|text| text.chars().take(64).collect()),
        None => None,
    };
    let mut separators = (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string());
    if let Some(given) = kwargs.get::<Option<Value>>("separators")? {
        let given: Vec<Value> = given.try_iter()?.collect();
        if let [item, key] = given.as_slice() {
            separators = (python_str(item)?, python_str(key)?);
        }
    }
    let mut dump = Dump {
        out: String::new(),
        indent,
        item_separator: separators.0,
        key_separator: separators.1,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.or(ensure_ascii).unwrap_or(false),
        state,
        paid_bytes: 0,
    };
    kwargs.assert_all_used()?;
    dump.value(value, 0)?;
    Ok(dump.out)
}

// --- Python's string methods that minijinja-contrib lacks ----------------------------------------------------------------------------

fn parts(values: [&str; 3]) -> Value {
    values.into_iter().map(Value::from).collect()
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Option<Value> {
    let argument = args.first().and_then(Value::as_str);
    Some(match (method, argument) {
        ("removeprefix", Some(prefix)) => Value::from(text.strip_prefix(prefix).unwrap_or(text)),
        ("removesuffix", Some(suffix)) => Value::from(text.strip_suffix(suffix).unwrap_or(text)),
        ("partition", Some(by)) if !by.is_empty() => match text.split_once(by) {
            Some((before, after)) => parts([before, by, after]),
            None => parts([text, "", ""]),
        },
        ("rpartition", Some(by)) if !by.is_empty() => match text.rsplit_once(by) {
            Some((before, after)) => parts([before, by, after]),
            None => parts(["", "", text]),
        },
        ("rsplit", Some(by)) if !by.is_empty() => {
            let limit = args.get(1).and_then(Value::as_i64).unwrap_or(-1);
            let mut pieces: Vec<&str> = if limit < 0 { text.rsplit(by).collect() } else { text.rsplitn(limit as usize + 1, by).collect() };
            pieces.reverse();
            pieces.into_iter().map(Value::from).collect()
        }
        ("index", Some(what)) => Value::from(text[..text.find(what)?].chars().count()),
        ("swapcase", None) => {
            let swap = |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        ("zfill", None) => {
            let width = args.first()?.as_usize()?.min(4096);
            Value::from(format!("{}{text}", "0".repeat(width.saturating_sub(text.chars().count()))))
        }
        _ => return None,
    })
}

fn unknown_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(result) = value.as_str().and_then(|text| string_method(text, method, args)) {
        return Ok(result);
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

// --- environment -------------------------------------------------------------------------------------------------------------------

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let text = python_str(message)?;
    Err(operation(text.clone()).with_source(Raised(text)))
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let format = std::ffi::CString::new(format).map_err(|_| operation("strftime_now: NUL in the format"))?;
    let mut buffer = [0u8; 512];
    // SAFETY: all pointers are to live local storage of the sizes given.
    let size = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut parts: libc::tm = std::mem::zeroed();
        libc::localtime_r(&now, &mut parts);
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr(), &parts)
    };
    Ok(String::from_utf8_lossy(&buffer[..size]).into_owned())
}

/// `{% generation %}` marks assistant text for training masks; for rendering it is a block that always runs.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        let sign = if tag.starts_with(['-', '+']) { 1 } else { 0 };
        let word = tag[sign..].trim_start();
        let skipped = tag.len() - word.len();
        for (name, replacement) in [("generation", " if true"), ("endgeneration", " endif")] {
            if let Some(after) = word.strip_prefix(name) {
                let end = after.trim_start();
                if end.starts_with("%}") || end.starts_with("-%}") || end.starts_with("+%}") {
                    out.push_str(&tag[..sign]);
                    out.push_str(replacement);
                    out.push(' ');
                    rest = &tag[skipped + name.len() + (after.len() - end.len())..];
                }
            }
        }
    }
    out.push_str(rest);
    out
}

fn environment(source: &str) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(unknown_method);
    env.set_formatter(|out, _state, value| {
        match value.as_str() {
            Some(text) => out.write_str(text),
            None => out.write_str(&python_str(value)?),
        }
        .map_err(Error::from)
    });
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| python_str(value));
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", |format: String| strftime_now(&format));
    env.add_template_owned("chat_template", without_generation_blocks(source))?;
    Ok(env)
}

fn from_json(value: serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(v) => Value::from(v),
        serde_json::Value::Number(v) => match (v.as_i64(), v.as_u64(), v.as_f64()) {
            (Some(v), _, _) => Value::from(v),
            (_, Some(v), _) => Value::from(v),
            (_, _, v) => Value::from(v.unwrap_or(0.0)),
        },
        serde_json::Value::String(v) => Value::from(v),
        serde_json::Value::Array(v) => v.into_iter().map(from_json).collect(),
        serde_json::Value::Object(v) => Value::from_pairs(v.into_iter().map(|(k, v)| (k, from_json(v)))),
    }
}

fn failure(error: Error) -> Failure {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(e) = source {
        if let Some(Raised(message)) = e.downcast_ref() {
            return Failure(RAISED, message.clone());
        }
        source = e.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return invalid("template does too much work (endless loop?)");
    }
    let line = error.line().map(|l| format!("line {l}: ")).unwrap_or_default();
    invalid(format!("{line}{}{}", error.kind(), error.detail().map(|d| format!(": {d}")).unwrap_or_default()))
}

fn on_own_stack<T: Send>(body: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, body);
        let thread = thread.map_err(|e| Failure(INTERNAL, format!("cannot start a thread for the template: {e}")))?;
        thread.join().unwrap_or_else(|panic| Err(Failure(INTERNAL, panic_message(&*panic))))
    })
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_template_new(
    source: *const c_char,
    size: usize,
    out: *mut *mut MlxlmTemplate,
    error: *mut MlxlmString,
) -> c_int {
    guard(error, || {
        let source = text(source, size)?;
        let env = on_own_stack(|| environment(source).map_err(failure))?;
        out.write(Box::into_raw(Box::new(MlxlmTemplate(env))));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_template_free(chat_template: *mut MlxlmTemplate) {
    if !chat_template.is_null() {
        guard(std::ptr::null_mut(), || {
            drop(Box::from_raw(chat_template));
            Ok(())
        });
    }
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_template_render(
    chat_template: *const MlxlmTemplate,
    context: *const c_char,
    context_size: usize,
    out: *mut MlxlmString,
    error: *mut MlxlmString,
) -> c_int {
    guard(error, || {
        let env = &(*chat_template).0;
        let context = bytes(context, context_size);
        let rendered = on_own_stack(|| {
            let context = serde_json::from_slice(context).map_err(|e| invalid(format!("context: {e}")))?;
            let template = env.get_template("chat_template").map_err(failure)?;
            template.render(from_json(context)).map_err(failure)
        })?;
        out.write(MlxlmString::new(rendered));
        Ok(())
    })
}
