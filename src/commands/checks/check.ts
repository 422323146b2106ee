/** What a check found: a sentence, and for the last two what to do. */
export interface Finding { status: 'ok' | 'WARN' | 'FAILED', text: string, hint?: string }

/** A check of `doctor`. `signal` fires when its time is over. A rejection is a failure, with `hint`. */
export interface Check {
  name: string
  hint: string
  /** The checks without which this one has no chance. */
  needs: string[]
  run: (signal: AbortSignal) => Promise<Finding>
}

export const ok = (text: string): Finding => ({ status: 'ok', text })
export const warning = (text: string, hint: string): Finding => ({ status: 'WARN', text, hint })
export const failed = (text: string, hint: string): Finding => ({ status: 'FAILED', text, hint })

/** How long a check may take. A part of it has less, so that it can still say what the other parts have found. */
export const TIMEOUT_MS = 5000
export const PART_MS = 4500

/** Returns the reason of an error in one line: its code and its words, without a full stop. */
export function reasonOf (error: unknown): string {
  const { code, message } = error as NodeJS.ErrnoException
  // OpenSSL's messages have several lines.
  const words = message.replace(/\s+/g, ' ').trim()
  return code === undefined || code === 'ERR_TUNNEL' || words.includes(code) ? words : `${code} (${words})`
}
