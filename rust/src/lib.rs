//! The C edge of the library: panics caught, strings and errors handed over. See mlxlm_rust.h, which this must match.

mod http;
mod template;
mod tokenizer;

use std::ffi::{c_char, c_int};
use std::panic::{catch_unwind, AssertUnwindSafe};

pub const OK: c_int = 0;
pub const INVALID: c_int = -1;
pub const RAISED: c_int = -2;
pub const NETWORK: c_int = -3;
pub const CANCELLED: c_int = -4;
pub const INTERNAL: c_int = -5;

pub struct Failure(pub c_int, pub String);
pub type Outcome<T> = Result<T, Failure>;

pub fn invalid(message: impl ToString) -> Failure {
    Failure(INVALID, message.to_string())
}

#[repr(C)]
pub struct MlxlmString {
    data: *mut c_char,
    size: usize,
}

impl MlxlmString {
    pub fn new(text: String) -> Self {
        let size = text.len();
        let mut bytes = text.into_bytes();
        bytes.push(0);
        let data = Box::into_raw(bytes.into_boxed_slice()) as *mut c_char;
        MlxlmString { data, size }
    }
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_string_free(string: MlxlmString) {
    if !string.data.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(string.data as *mut u8, string.size + 1)));
    }
}

/// Bytes of a caller; NULL with size 0 is the empty string.
pub unsafe fn bytes<'a>(data: *const c_char, size: usize) -> &'a [u8] {
    if data.is_null() || size == 0 {
        &[]
    } else {
        std::slice::from_raw_parts(data as *const u8, size)
    }
}

pub unsafe fn text<'a>(data: *const c_char, size: usize) -> Outcome<&'a str> {
    std::str::from_utf8(bytes(data, size)).map_err(|e| invalid(format!("text is not UTF-8: {e}")))
}

/// Runs `body`; a failure or a panic becomes a code and a message.
pub unsafe fn guard(error: *mut MlxlmString, body: impl FnOnce() -> Outcome<()>) -> c_int {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return OK,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure(INTERNAL, panic_message(&*panic)),
    };
    if !error.is_null() {
        error.write(MlxlmString::new(failure.1));
    }
    failure.0
}

pub fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let what = panic.downcast_ref::<&str>().map(|s| s.to_string()).or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panic: {}", what.unwrap_or_else(|| "unknown".into()))
}
