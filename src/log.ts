/** What is said about the work; `pino` fits. */
export type Log = Record<'debug' | 'info' | 'warn' | 'error', (what: object, message: string) => void>
