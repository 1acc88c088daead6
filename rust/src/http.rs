//! One streaming HTTP request, through ureq and rustls.

use crate::*;
use std::ffi::{c_void, CStr, CString};
use std::io::Read;
use std::sync::OnceLock;
use std::time::Duration;
use ureq::http::{HeaderMap, Request, Response, Uri};
use ureq::tls::{parse_pem, PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Body};

#[repr(C)]
pub struct MlxlmHttpHead {
    status: c_int,
    content_length: i64,
    url: *const c_char,
    etag: *const c_char,
    x_linked_etag: *const c_char,
    x_linked_size: i64,
    x_repo_commit: *const c_char,
    location: *const c_char,
    content_range: *const c_char,
    content_type: *const c_char,
    accept_ranges: *const c_char,
    x_error_code: *const c_char,
    x_error_message: *const c_char,
    headers: *const c_char,
}

#[repr(C)]
pub struct MlxlmHttpRequest {
    url: *const c_char,
    headers: *const c_char,
    method: *const c_char,
    range_start: i64,
    follow_redirects: c_int,
    follow_relative_only: c_int,
    connect_timeout_ms: c_int,
    read_timeout_ms: c_int,
    on_head: Option<unsafe extern "C" fn(*mut c_void, *const MlxlmHttpHead) -> c_int>,
    on_body: Option<unsafe extern "C" fn(*mut c_void, *const c_char, usize) -> c_int>,
    context: *mut c_void,
}

unsafe fn optional<'a>(text: *const c_char) -> Outcome<&'a str> {
    if text.is_null() {
        return Ok("");
    }
    CStr::from_ptr(text).to_str().map_err(|e| invalid(format!("request: not UTF-8: {e}")))
}

fn network(what: impl std::fmt::Display) -> Failure {
    Failure(NETWORK, what.to_string())
}

/// Certificates named by the environment, as Python's requests and OpenSSL read it; Mozilla's otherwise.
fn roots() -> RootCerts {
    static ROOTS: OnceLock<RootCerts> = OnceLock::new();
    ROOTS
        .get_or_init(|| {
            let mut files: Vec<std::path::PathBuf> = Vec::new();
            for name in ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"] {
                files.extend(std::env::var_os(name).filter(|v| !v.is_empty()).map(Into::into));
            }
            if let Some(folder) = std::env::var_os("SSL_CERT_DIR").filter(|v| !v.is_empty()) {
                files.extend(std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()));
            }
            let mut certificates = Vec::new();
            for pem in files.iter().filter_map(|f| std::fs::read(f).ok()) {
                certificates.extend(parse_pem(&pem).filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                }));
            }
            if certificates.is_empty() {
                RootCerts::WebPki
            } else {
                certificates.into()
            }
        })
        .clone()
}

fn agent(connect_timeout: Duration, read_timeout: Duration) -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_connect(Some(connect_timeout))
        .timeout_resolve(Some(connect_timeout))
        .timeout_recv_response(Some(read_timeout))
        .timeout_per_read(Some(read_timeout))
        .timeout_per_write(Some(read_timeout))
        .accept_encoding("identity") // a compressed body would break resuming
        .tls_config(TlsConfig::builder().root_certs(roots()).build())
        .build()
        .into()
}

/// The absolute target of a redirect, and whether `location` was relative.
fn redirect_target(from: &Uri, location: &str) -> (String, bool) {
    let authority = from.authority().map_or("", |a| a.as_str());
    let scheme = from.scheme_str().unwrap_or("https");
    if location.contains("://") {
        (location.to_string(), false)
    } else if location.starts_with("//") {
        (format!("{scheme}:{location}"), false)
    } else if location.starts_with('/') {
        (format!("{scheme}://{authority}{location}"), true)
    } else {
        let folder = from.path().rfind('/').map_or("/", |end| &from.path()[..=end]);
        (format!("{scheme}://{authority}{folder}{location}"), true)
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("")
}

struct Call<'a> {
    agent: Agent,
    method: &'a str,
    headers: Vec<(&'a str, &'a str)>,
    range_start: i64,
    follow_redirects: c_int,
    relative_only: bool,
}

impl Call<'_> {
    fn once(&self, url: &str, same_host: bool) -> Outcome<Response<Body>> {
        let mut request = Request::builder().method(self.method).uri(url);
        for (name, value) in &self.headers {
            if same_host || !name.eq_ignore_ascii_case("authorization") && !name.eq_ignore_ascii_case("cookie") {
                request = request.header(*name, *value);
            }
        }
        if self.range_start > 0 {
            request = request.header("Range", format!("bytes={}-", self.range_start));
        }
        let request = request.body(()).map_err(|e| invalid(format!("{url}: {e}")))?;
        self.agent.run(request).map_err(|e| match e {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => invalid(format!("{url}: {e}")),
            e => network(format!("{url}: {e}")),
        })
    }

    /// The answer after redirects, and its URL.
    fn follow(&self, url: &str) -> Outcome<(Response<Body>, String)> {
        let parse = |u: &str| u.parse::<Uri>().map_err(|e| invalid(format!("{u}: {e}")));
        let first = parse(url)?;
        if !matches!(first.scheme_str(), Some("http" | "https")) || first.authority().is_none() {
            return Err(invalid(format!("{url}: not an http or https URL")));
        }
        let mut at = url.to_string();
        let mut left = self.follow_redirects;
        loop {
            let here = parse(&at)?;
            let same_host = here.authority() == first.authority() && here.scheme() == first.scheme();
            let response = self.once(&at, same_host)?;
            let location = header(response.headers(), "location");
            if !response.status().is_redirection() || location.is_empty() || self.follow_redirects <= 0 {
                return Ok((response, at));
            }
            let (target, relative) = redirect_target(&here, location);
            if self.relative_only && !relative {
                return Ok((response, at));
            }
            if here.scheme_str() == Some("https") && !target.starts_with("https://") {
                return Err(network(format!("{at}: redirect from https to {target}")));
            }
            if left == 0 {
                return Err(network(format!("{at}: more than {} redirects", self.follow_redirects)));
            }
            left -= 1;
            at = target;
        }
    }
}

unsafe fn report_head(request: &MlxlmHttpRequest, response: &Response<Body>, url: &str, length: i64) -> Outcome<()> {
    let Some(on_head) = request.on_head else { return Ok(()) };
    let headers = response.headers();
    let c = |text: &str| CString::new(text.replace('\0', "")).unwrap_or_default();
    let get = |name: &str| c(header(headers, name));
    let all: String = headers.iter().filter_map(|(n, v)| Some(format!("{n}: {}\n", v.to_str().ok()?))).collect();
    let (url, etag, linked, commit, location) = (c(url), get("etag"), get("x-linked-etag"), get("x-repo-commit"), get("location"));
    let (range, kind, accept, all) = (get("content-range"), get("content-type"), get("accept-ranges"), c(&all));
    let (error_code, error_message) = (get("x-error-code"), get("x-error-message"));
    let head = MlxlmHttpHead {
        status: response.status().as_u16().into(),
        content_length: length,
        url: url.as_ptr(),
        etag: etag.as_ptr(),
        x_linked_etag: linked.as_ptr(),
        x_linked_size: header(headers, "x-linked-size").parse().unwrap_or(-1),
        x_repo_commit: commit.as_ptr(),
        location: location.as_ptr(),
        content_range: range.as_ptr(),
        content_type: kind.as_ptr(),
        accept_ranges: accept.as_ptr(),
        x_error_code: error_code.as_ptr(),
        x_error_message: error_message.as_ptr(),
        headers: all.as_ptr(),
    };
    if on_head(request.context, &head) != 0 {
        return Err(Failure(CANCELLED, "stopped by the caller".into()));
    }
    Ok(())
}

unsafe fn stream_body(request: &MlxlmHttpRequest, response: Response<Body>, url: &str, length: i64) -> Outcome<()> {
    let Some(on_body) = request.on_body else { return Ok(()) };
    let mut reader = response.into_body().into_with_config().limit(u64::MAX).reader();
    let mut buffer = vec![0u8; 256 * 1024];
    let mut got = 0i64;
    loop {
        let size = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(size) => size,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(network(format!("{url}: after {got} bytes: {e}"))),
        };
        got += size as i64;
        if on_body(request.context, buffer.as_ptr() as *const c_char, size) != 0 {
            return Err(Failure(CANCELLED, "stopped by the caller".into()));
        }
    }
    if length >= 0 && got < length {
        return Err(network(format!("{url}: connection closed after {got} of {length} bytes")));
    }
    Ok(())
}

unsafe fn run(request: &MlxlmHttpRequest, status: &mut c_int) -> Outcome<()> {
    let ms = |value: c_int, default: u64| Duration::from_millis(if value > 0 { value as u64 } else { default });
    let url = optional(request.url)?;
    let method = match optional(request.method)? {
        "" | "GET" => "GET",
        "HEAD" => "HEAD",
        other => return Err(invalid(format!("{url}: method '{other}', wanted GET or HEAD"))),
    };
    let lines = optional(request.headers)?.split('\n').map(str::trim).filter(|l| !l.is_empty());
    let headers: Vec<_> = lines.filter_map(|line| line.split_once(':')).map(|(name, value)| (name.trim(), value.trim())).collect();
    let call = Call {
        agent: agent(ms(request.connect_timeout_ms, 10_000), ms(request.read_timeout_ms, 30_000)),
        method,
        headers,
        range_start: request.range_start,
        follow_redirects: request.follow_redirects,
        relative_only: request.follow_relative_only != 0,
    };
    let (response, url) = call.follow(url)?;
    *status = response.status().as_u16().into();
    let length = header(response.headers(), "content-length").parse().unwrap_or(-1);
    report_head(request, &response, &url, length)?;
    if method == "HEAD" {
        return Ok(());
    }
    stream_body(request, response, &url, length)
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_http(request: *const MlxlmHttpRequest, status: *mut c_int, error: *mut MlxlmString) -> c_int {
    let mut got = 0;
    let result = guard(error, || run(&*request, &mut got));
    if !status.is_null() {
        status.write(got);
    }
    result
}
